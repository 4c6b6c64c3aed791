"""The examples run, and say what they promise."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples import finetuning, gan, hugging_face, segmentation, transformer
from examples.gallery import __main__ as gallery
from examples.gallery import cases
from examples.lightning_cli import main as lightning_cli
from lightning_hesd import HessianSpectrumCallback, SpectrumHistory
from tests.programs import run_python

EXAMPLES = Path(__file__).parents[1] / "examples"


def analyzed(history: SpectrumHistory, epochs: list[int]) -> list[Any]:
    """Return the records, of which none has failed."""
    assert [(record.epoch, record.error) for record in history] == [(epoch, None) for epoch in epochs]
    assert all(math.isfinite(record.spectrum.c_t) for record in history)
    return list(history)


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save time: a program in a process of its own, as `test_digits` runs it, draws them."""
    monkeypatch.setattr("lightning_hesd.training.loggers.tensorboard.figures", lambda history: ())


def test_digits(tmp_path: Path) -> None:
    options = ["--model", "resnet", "--epochs", "3", "--samples", "32", "--optimizer", "sgd-momentum"]
    said = run_python(str(EXAMPLES / "digits.py"), *options, cwd=tmp_path)
    rows = re.findall(r"^ *(start|\d+)  .*\[ *(-?\d\.\d+), *(-?\d\.\d+)\] +(\d+\.\d+)  (MP|MN)", said, re.MULTILINE)
    assert [row[0] for row in rows] == ["start", "2"]
    assert all(float(low) <= float(high) <= 0 for _, low, high, *_ in rows)
    for rule in ("highest C_t", "lowest λ_max"):
        assert re.search(rf"^{rule} +picks epoch +2, generalization accuracy 0\.\d+", said, re.MULTILINE)
    assert "One run cannot tell a rule from the last epoch: at least 6 runs are needed (level 5%)." in said
    assert "tensorboard --logdir runs/digits" in said

    events = EventAccumulator(str(next((tmp_path / "runs" / "digits").rglob("events.*")).parent))
    events.Reload()
    assert {"hesd/c_t", "hesd/lambda_max", "train_acc", "gen_acc"} <= set(events.Tags()["scalars"])
    assert events.Tags()["histograms"] == ["hesd/density", "hesd_gen/density"]
    drawn = [f"{name}/{kind}_figure" for name in ("hesd", "hesd_gen") for kind in ("density", "losses_along")]
    assert sorted(events.Tags()["images"]) == drawn


def test_lightning_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["main"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 with jsonargparse 4.53
    config = EXAMPLES / "lightning_cli" / "config.yaml"
    quick = ["--trainer.callbacks.every_n_epochs=1", "--trainer.callbacks.steps=8", "--trainer.max_epochs=2"]
    trainer = lightning_cli.main(["fit", "--config", str(config), *quick]).trainer
    [spectra] = [c for c in trainer.callbacks if isinstance(c, HessianSpectrumCallback)]
    for record in analyzed(spectra.history, [0, 1]):
        assert list(record.layers) == ["net.0", "net.2"]
        assert record.assessment is not None
        assert record.preconditioned is not None
    printed = capsys.readouterr().out
    [best] = re.findall(r"^best by highest_c_t: (.+\.ckpt)$", printed, re.MULTILINE)
    assert Path(best).exists()
    assert len(re.findall(r"^epoch +[01]: criteria of ", printed, re.MULTILINE)) == 2


def test_transformer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spectra = transformer.main(["--epochs=2", "--layers=1", "--steps=4", "--samples=16", f"--log-dir={tmp_path}"])
    *_, record = analyzed(spectra.history, [0, 1])
    blocks = {name: layer.dimension for name, layer in record.layers.items()}
    assert {"model.tokens", "model.layers.0.attention", "model.layers.0.mlp", "model.norm"} <= set(blocks)
    assert sum(blocks.values()) == record.spectrum.dimension
    printed = capsys.readouterr().out
    for name, dimension in blocks.items():
        assert re.search(rf"^{re.escape(name)} +{dimension} +-?\d\.\d{{4}} ", printed, re.MULTILINE)
    assert (tmp_path / "version_0" / "hesd" / "index.json").exists()


def test_hugging_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="not a dependency; tests/training/test_language_models.py stands in")
    pytest.importorskip("peft")
    quick = ["--pretraining=2", "--epochs=2", "--steps=3", f"--log-dir={tmp_path}", f"--figure={tmp_path}/figure.png"]
    module, spectra, rule = hugging_face.main(quick)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    for record in analyzed(spectra.history, [-1, 1]):
        assert record.spectrum.dimension == trained
    assert Path(rule.best_model_path).is_file()
    assert (tmp_path / "figure.png").is_file()
    assert re.search(r"^    1 .* M[PN]  picked$", capsys.readouterr().out, re.MULTILINE)


def test_gan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spectra = gan.main(["--epochs=2", "--every=1", "--steps=4", f"--log-dir={tmp_path}"])
    players = {"generator": gan.network(gan.NOISE, 2), "discriminator": gan.network(2, 1)}
    for name, player in players.items():
        for record in analyzed(spectra[name].history, [0, 1]):
            assert record.spectrum.dimension == sum(p.numel() for p in player.parameters())
        assert (tmp_path / "version_0" / name / "index.json").exists()
    one, other = (spectra[name].history[0].spectrum.loss for name in players)
    assert one != other
    printed = capsys.readouterr().out
    rows = re.findall(r"^    [01] ( +-?\d+\.\d{4}){4}  M[PN] +( +-?\d+\.\d{4}){4}  M[PN]$", printed, re.MULTILINE)
    assert len(rows) == 2


@pytest.mark.filterwarnings("ignore:lightning_hesd. none of the epochs with nearly the best:RuntimeWarning")
def test_segmentation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, spectra, rule = segmentation.main(["--epochs=4", "--steps=6", "--images=64", f"--log-dir={tmp_path}"])
    analyzed(spectra.history, [1, 3])
    assert rule.best is not None
    assert Path(rule.best_model_path).exists()
    assert rule.best.score == pytest.approx(module.ious[rule.best.epoch][0])
    printed = capsys.readouterr().out
    assert re.search(rf"^ +{rule.best.epoch} .* picked$", printed, re.MULTILINE)
    assert re.search(r"^The pick has an IoU of 0\.\d+ on other images\.$", printed, re.MULTILINE)
    # Pixels on edges do not count.
    images, labels = segmentation.shapes(4, seed=0).tensors
    assert segmentation.labeled_pixels([images, labels]) == sum(int((labels == c).sum()) for c in range(3))
    assert set(labels.unique().tolist()) == {0, 1, 2, segmentation.EDGE}


def test_finetuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--pretraining=1", "--epochs=4", "--thaw=2", "--steps=6", f"--log-dir={tmp_path}"]
    spectra = finetuning.main(arguments)
    head, everything = 5 * (finetuning.FEATURES + 1), sum(p.numel() for p in finetuning.Classifier().parameters())
    frozen, thawed = zip(*(callback.history for callback in spectra.values()), strict=True)
    assert [record.spectrum.dimension for record in frozen] == [head, everything]
    assert [record.spectrum.dimension for record in thawed] == [everything, everything]
    trained, of_all = (record.spectrum for record in frozen)
    assert trained.c_t == pytest.approx(0, abs=1e-4)
    assert of_all.c_t < -1e-3
    assert trained.loss == pytest.approx(of_all.loss, rel=1e-5)
    trained, of_all = (record.spectrum for record in thawed)
    assert trained.c_t == pytest.approx(of_all.c_t, rel=1e-5)
    assert "accuracy on 5 to 9: " in capsys.readouterr().out


def test_gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`test_docs` runs the code of its page, which draws the other pictures of the folder."""
    monkeypatch.setattr(cases, "TRAIN_SIZE", 64)  # to save time
    cases.draw_cases(tmp_path, epochs=1, many_epochs=2)
    drawn = {path.name for path in tmp_path.iterdir()}
    of_page = set(re.findall(r"savefig\(\"(.+?\.png)\"\)", gallery.PAGE.read_text(encoding="utf-8"))) - {"judge.png"}
    assert drawn | of_page == {path.name for path in gallery.IMAGES.iterdir()}
    said = capsys.readouterr().out
    assert re.search(r"^mn: C_t = -.*type MN", said, re.MULTILINE)
    assert re.search(r"^unverified: .*; not verified: ", said, re.MULTILINE)
    assert re.search(r"^few-samples: .*\(sampling\).* \(48 samples", said, re.MULTILINE)
