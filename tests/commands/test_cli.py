"""The command line: real checkpoints of a real run, from this process and from another one."""

import csv
import importlib.metadata
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch.utils.data import DataLoader

from lightning_hesd import HessianSpectrumCallback, Spectrum, __main__, commands
from lightning_hesd.commands import completion, results
from lightning_hesd.commands.cli import COMMANDS, main
from lightning_hesd.sample_size.recommendation import recommend_sample_size
from lightning_hesd.spectra.assessment import CAVEAT
from tests.programs import run_program, run_python
from tests.training import cli_project, processes
from tests.training.modules import Digits

MODEL = ["--model", "tests.training.cli_project.Net", "--data", "tests.training.cli_project.Data"]
STEPS = [f"--analysis.{name}={value}" for name, value in cli_project.ANALYSIS.items()]
CPU = ["--accelerator", "cpu"]
ESTIMATE = ["estimate", "--gradient_seconds=0.01"]

Paths = list[Path]
Run = tuple[HessianSpectrumCallback, Paths]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return cli_project.run(tmp_path_factory.mktemp("run"), preconditioner="optimizer")


@pytest.fixture(scope="module")
def paths(trained: Run) -> Paths:
    return trained[1]


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The figures that `analyze` would have drawn in this process."""
    figures: list[Path] = []
    monkeypatch.setattr(results, "save_figure", lambda path, *_, **__: figures.append(path))
    return figures


def analyze(out: Path, *arguments: Any, model: list[str] | None = None) -> dict[str, Any]:
    main(["analyze", *map(str, arguments), *(MODEL if model is None else model), *STEPS, *CPU, "--out", str(out)])
    return json.loads((out / "results.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Return the one line that a refused command leaves."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert exit_.value.code in {1, 2}
    said = capsys.readouterr().err
    assert said.startswith("lightning-hesd: error: ")
    assert said.count("\n") == 1
    return said


def test_another_process_finds_what_the_callback_found(trained: Run, tmp_path: Path) -> None:
    spectra, paths = trained
    arguments = ["analyze", str(paths[0].parent / "epoch=[01].ckpt"), *MODEL, *STEPS, *CPU, "--generalization", "val"]
    arguments += ["--preconditioned", "true", "--out", str(tmp_path / "out")]
    said = run_python("-m", "lightning_hesd", *arguments)
    for record, path in zip(spectra.history[:2], paths[:2], strict=True):
        for field, kind in (("spectrum", ""), ("generalization", "_gen"), ("preconditioned", "_pre")):
            theirs, name = getattr(record, field), f"{path.stem}{kind}.npz"
            ours = Spectrum.load(tmp_path / "out" / "spectra" / name)
            assert ours.num_samples == theirs.num_samples
            for value in ("c_t", "lambda_min", "lambda_max"):
                assert getattr(ours, value) == pytest.approx(getattr(theirs, value), rel=1e-5)
            assert ours.k_h() == pytest.approx(theirs.k_h(), rel=1e-3)
            assert (tmp_path / "out" / "figures" / name).with_suffix(".png").stat().st_size > 10_000
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, record in zip(rows, spectra.history[:2], strict=True):
        assert (int(row["epoch"]), int(row["step"])) == (record.epoch, record.global_step)
        assert row["criteria"] == record.assessment.words
        assert float(row["delta_k_h05"]) == pytest.approx(record.assessment.delta_k_h05, rel=1e-3)
        assert float(row["stability_ratio"]) == pytest.approx(record.stability_ratio, rel=1e-5)
    assert {rule for row in rows for rule in row["picked_by"].split(", ") if rule} == {"highest C_t", "lowest λ_max"}
    table = said[said.index("2 checkpoints") :].splitlines()
    assert table[1].split() == ["checkpoint", "C_t", "[interval]", "type", "λ_max", "loss", "pick"]
    assert all(len(line) <= 80 for line in table[:-1]), table
    verdicts = [record.assessment.words for record in spectra.history[:2]]
    assert f"criteria of Gabdullin (2025), Fig. 10: {verdicts[0]} {verdicts.count(verdicts[0])}×" in said
    assert CAVEAT in said
    assert "[2/2]" in said


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_several_ranks_find_what_one_finds(trained: Run, tmp_path: Path, launcher: str) -> None:
    """Also at the second checkpoint, when the ranks run already; rank zero alone writes and prints."""
    spectra, paths = trained
    arguments = ["analyze", *map(str, paths[:2]), *MODEL, *STEPS, *CPU]
    arguments += ["--batch_size", "8", "--devices", "2", "--strategy", "ddp"]
    if launcher == "torchrun":
        with processes.started(Path(__main__.__file__), tmp_path, 2, *arguments) as ranks:
            assert [rank.wait() for rank in ranks] == [0, 0], [rank.said for rank in ranks]
            said = "".join(rank.said for rank in ranks)
    else:
        said = "".join(run_program("-m", "lightning_hesd", *arguments, "--out", str(tmp_path)))
    assert "MEMBER: 2/2" in said
    assert said.count("[1/2]") == said.count("[2/2]") == 1
    for record, path in zip(spectra.history, paths[:2], strict=False):
        ours = Spectrum.load(tmp_path / "spectra" / f"{path.stem}.npz")
        assert ours.num_samples == record.spectrum.num_samples > 8
        assert ours.c_t == pytest.approx(record.spectrum.c_t, rel=1e-5)


def test_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        main([*ESTIMATE, "--memory_bandwidth", "1000", *arguments])
        return " ".join(capsys.readouterr().out.split())

    # 100 products of 2.2 gradients and three more, of 512 samples at 10 ms; 111 vectors of a billion float32.
    alone = said("--params", "1B", "--device_memory", "80")
    assert "products 19.0 min a gradient of a sample takes 10 ms" in alone
    assert "It does not fit in 80 GB: it takes 417.2 GiB with the network. With `basis='none'` it takes 67.1" in alone
    together = said("--params", "1e9", "--processes", "8", "--sharded", "true")
    assert "memory 51.7 GiB beyond the network's 476.8 MiB per process" in together
    main([*ESTIMATE, "--params", "1e6"])
    assert " at 0 GB/s" not in capsys.readouterr().out  # measured


def test_an_interrupted_run_goes_on(
    paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for path in paths[:2]:
        shutil.copy2(path, folder)
    analyze(tmp_path / "out", folder / "*.ckpt")
    before = (tmp_path / "out" / "spectra" / "epoch=0.npz").stat().st_mtime_ns
    shutil.copy2(paths[2], folder)
    capsys.readouterr()
    found = analyze(tmp_path / "out", folder / "*.ckpt")
    assert sorted(found["checkpoints"]) == ["epoch=0", "epoch=1", "epoch=2"]
    assert (tmp_path / "out" / "spectra" / "epoch=0.npz").stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("(known)") == 2
    # A file that has changed since is analyzed anew.
    shutil.copy(paths[1], folder / paths[0].name)
    assert analyze(tmp_path / "out", folder / "*.ckpt")["table"][0]["epoch"] == 1


def test_results_of_other_options_are_not_mixed(
    paths: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    analyze(tmp_path / "out", paths[0])
    out = ["--out", tmp_path / "out"]
    said = refused(capsys, "analyze", paths[0], *MODEL, *CPU, "--analysis.steps=7", "--num_samples=9", *out)
    assert "results.json has results of another analysis (`" in said
    (tmp_path / "out" / "results.json").write_text("{")
    assert "results.json is damaged" in refused(capsys, "analyze", paths[0], *MODEL, *CPU, *out)


def test_results_that_are_infinite_are_read_again(tmp_path: Path) -> None:
    results.Results(tmp_path, {}).finish([{"c_t": -math.inf, "loss": math.nan, "epoch": 1}])
    results.Results(tmp_path, {})
    assert json.loads((tmp_path / "results.json").read_text())["table"] == [{"c_t": None, "loss": None, "epoch": 1}]
    assert "-inf,nan,1" in (tmp_path / "results.csv").read_text()


def test_a_configuration_of_lightning_cli_will_do(paths: Paths, tmp_path: Path) -> None:
    config = {
        "seed_everything": 1,
        "trainer": {"max_epochs": 3},
        "model": {
            "class_path": "tests.training.cli_project.Net",
            "init_args": {"width": 6, "activation": {"class_path": "torch.nn.Sigmoid"}},
        },
        "data": {"class_path": "tests.training.cli_project.Data", "init_args": {"size": 20}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    from_config = ["--config", tmp_path / "config.yaml"]
    sigmoid = analyze(tmp_path / "out", paths[0], *from_config, "--num_samples=24", model=[])
    tanh = analyze(tmp_path / "tanh", paths[0], "--num_samples=24")
    assert sigmoid["table"][0]["loss"] != tanh["table"][0]["loss"]
    # What the command line says goes first.
    smaller = analyze(tmp_path / "smaller", paths[0], *from_config, "--data.size=16", "--num_samples=99", model=[])
    assert Spectrum.load(tmp_path / "smaller" / "spectra" / "epoch=0.npz").num_samples == 16
    assert smaller["options"]["data_args"] == {"size": 16}


def test_another_data_module_for_generalization(paths: Paths, tmp_path: Path) -> None:
    other = ["--generalization", "tests.training.cli_project.Other", "--generalization.batch_size=4"]
    found = analyze(tmp_path / "other", paths[2], *other, "--num_samples=40")
    own = analyze(tmp_path / "own", paths[2], "--generalization=val", "--num_samples=40")
    for key in ("delta_r_e", "delta_k_h05"):
        assert found["table"][0][key] == pytest.approx(own["table"][0][key], rel=1e-3)


def test_checkpoints_of_one_name_are_told_apart(paths: Paths, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(paths[0], tmp_path / folder)
    found = analyze(tmp_path / "out", tmp_path / "a" / "epoch=0.ckpt", tmp_path / "b" / "epoch=0.ckpt")
    assert sorted(found["checkpoints"]) == ["b_epoch=0", "epoch=0"]


def test_manual_optimization_needs_a_loss(paths: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manual = ["--model=tests.training.cli_project.ManualNet", *MODEL[2:]]
    said = refused(capsys, "analyze", paths[0], *manual, *CPU, "--out", tmp_path / "out")
    assert "ManualNet uses manual optimization" in said
    assert "pass `--loss_fn`, a function" in said
    with_loss = analyze(tmp_path / "out", paths[0], "--loss_fn=tests.training.cli_project.loss", model=manual)
    plain = analyze(tmp_path / "plain", paths[0])
    assert with_loss["table"][0]["c_t"] == plain["table"][0]["c_t"]


def test_bad_input_takes_one_line(paths: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    torch.save({"state_dict": {}, "object": Path("x")}, tmp_path / "object.ckpt")
    torch.save(torch.load(paths[0], weights_only=True) | {"optimizer_states": []}, tmp_path / "weights.ckpt")
    preconditioned = [tmp_path / "weights.ckpt", "--preconditioned=true"]
    damaged = bytearray(paths[0].read_bytes())
    (tmp_path / "cut.ckpt").write_bytes(damaged[: len(damaged) // 2])
    out = ["--out", str(tmp_path / "out")]
    cases: list[tuple[list[Any], str]] = [
        ([tmp_path / "none.ckpt"], "none.ckpt does not exist"),
        ([tmp_path / "*.none"], "no file matches"),
        ([tmp_path], "is no file"),
        ([tmp_path / "text.ckpt"], "text.ckpt"),
        ([tmp_path / "cut.ckpt"], "cut.ckpt cannot be read as a checkpoint"),
        ([tmp_path / "other.ckpt"], "is no Lightning checkpoint: it has no 'state_dict'"),
        ([tmp_path / "object.ckpt"], r"--unsafe"),
        ([paths[0], "--model.width=7"], "do not fit Net: "),
        ([paths[0], "--model.depth=7"], "Net cannot be instantiated: "),
        ([paths[0], "--model=tests.training.cli_project.Nothing"], "cannot import 'tests.training.cli_project.No"),
        ([paths[0], "--model=nowhere.Net"], "cannot import 'nowhere.Net': No module named 'nowhere'"),
        ([paths[0], "--model=tests.training.cli_project.Data"], "must be a LightningModule, got "),
        ([paths[0], "--generalization=tests.training.cli_project.Net"], "must be a LightningDataModule"),
        ([paths[0], "--config", tmp_path / "none.yaml"], "cannot read the configuration"),
        ([paths[0], "--analysis.steps=0"], "`steps` must be a positive integer, got 0"),
        ([paths[0], "--analysis.steps=many"], "steps"),
        ([paths[0], "--step=5"], "--step"),
        (preconditioned, "the checkpoint has the states of 0 optimizers, the module 1 optimizers"),
    ]
    for arguments, message in cases:
        said = refused(capsys, "analyze", *MODEL, *CPU, *out, *arguments)
        assert message in said, said
    assert "there is no model: pass --model package.Class" in refused(capsys, "analyze", paths[0], *out)
    assert "subcommand" in refused(capsys, "paint")
    assert not (tmp_path / "out" / "results.csv").exists()


def test_one_failure_does_not_stop_the_others(paths: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = torch.load(paths[0], weights_only=True)
    checkpoint["state_dict"]["net.0.bias"].fill_(torch.nan)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    said = refused(capsys, "analyze", tmp_path / "a.ckpt", paths[1], *MODEL, *STEPS, *CPU, "--out", tmp_path / "out")
    assert "1 of 2 analyses failed; the first, of " in said
    assert "the loss of batch 0 is nan" in said
    table = json.loads((tmp_path / "out" / "results.json").read_text())["table"]
    assert [row["error"] is None for row in table] == [False, True]
    assert table[1]["picked_by"] == "highest C_t, lowest λ_max"


def test_assess_and_plot(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spectra, _ = trained
    record = spectra.history[-1]
    record.spectrum.save(tmp_path / "train.npz")
    record.generalization.save(tmp_path / "gen.npz")
    main(["assess", str(tmp_path / "train.npz"), str(tmp_path / "gen.npz")])
    assert capsys.readouterr().out.splitlines() == [
        f"criteria of Gabdullin (2025), Fig. 10 ({CAVEAT}): {record.assessment.words}",
        *(f"- {reason}" for reason in record.assessment.reasons),
    ]
    main(["plot", str(tmp_path / "train.npz"), str(tmp_path / "gen.npz"), "--out", str(tmp_path / "figures")])
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["gen.png", "train.png"]
    main(["plot", str(tmp_path / "train.npz")])
    assert (tmp_path / "train.png").stat().st_size > 10_000
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    assert "bad.npz is not a spectrum" in refused(capsys, "plot", tmp_path / "bad.npz", "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert "none.npz" in refused(capsys, "assess", tmp_path / "none.npz", tmp_path / "gen.npz")


def test_sample_size(paths: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--tolerance=0.3", "--confidence=0.8", "--steps=40"]
    main(["sample-size", str(paths[0]), str(paths[2]), *MODEL, *CPU, "--num_samples=40", *asked])
    said = capsys.readouterr().out
    # All samples that there are, so that those of the command are known.
    module = cli_project.Net.load_from_checkpoint(paths[2])
    found = recommend_sample_size(
        module,
        DataLoader(Digits(40), batch_size=8),
        lambda net, batch: F.cross_entropy(net.net(batch[0]), batch[1], reduction="none"),
        tolerance=0.3,
        confidence=0.8,
        steps=40,
    )
    ours = said[said.index(str(paths[2])) :].removeprefix(f"{paths[2]}:\n").splitlines()
    assert said.startswith(f"{paths[0]}:\n")
    assert said.count("samples are enough, with a confidence of 80% for each quantity.") == 2
    assert ours[1] == str(found).splitlines()[1]  # the loss; the spectra differ by grouping
    for name, title in (("lambda_max", "λ_max"), ("c_t", "C_t")):
        (line,) = (line for line in ours if line.startswith(f"- {title}: "))
        samples = float(line.split()[2].replace(",", ""))
        assert found.requirements[name].interval[0] / 2 < samples < 2 * found.requirements[name].interval[1]

    main(["sample-size", str(paths[0]), *MODEL, *CPU])
    assert "With 24 samples " in " ".join(capsys.readouterr().out.split())  # the samples of the run


def test_sample_size_refuses_in_one_line(paths: Paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = torch.load(paths[0], weights_only=True)
    checkpoint["state_dict"]["net.0.bias"].fill_(torch.nan)
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    cases: list[tuple[list[Any], str]] = [
        ([paths[0], "--tolerance=0"], "`tolerance` must be positive and finite, got 0.0"),
        ([paths[0], "--confidence=2"], "`confidence` must lie between 0 and 1, got 2.0"),
        ([paths[0], "--num_samples=5"], "8"),
        ([tmp_path / "nan.ckpt"], "the loss of batch 0 is nan"),
        ([tmp_path / "none.ckpt"], "none.ckpt does not exist"),
    ]
    for arguments, message in cases:
        assert message in refused(capsys, "sample-size", *MODEL, *CPU, *arguments)


def test_it_prints_its_help_and_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: lightning-hesd")
    assert all(name in printed for name in ("analyze", "judge", "report"))
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.split()[-1] == importlib.metadata.version("lightning-hesd")


@pytest.mark.parametrize("command", [*COMMANDS])
def test_help_is_in_plain_words(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    said = capsys.readouterr().out
    types = ("<class", "typing.", "Optional[", "Union[", "Literal[", "Callable")
    for leak in (*types, "type:", "null", "None:", "lightning_hesd."):
        assert leak not in said
    words = said.partition("\n\n")[2].splitlines()  # after the usage, in which argparse breaks no choices
    assert all(len(line) <= 80 for line in words)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["judge", "x", "--metric", "a", "--mode", "up"], "--mode must be 'max' or 'min', got 'up'"),
        (["judge", "x", "--metric", "a", "--level", "b"], "--level must be a number, got 'b'"),
        (["judge", "x"], "the following arguments are required: metric"),
        ([*ESTIMATE, "--params=1", "--sharded=maybe"], "--sharded must be true or false, got "),
        ([*ESTIMATE, "--params=7q"], "`params` must be a number of parameters, such as 7B, 125M or 2.5e6, got '7q'"),
        ([*ESTIMATE, "--params=7B", "--device_memory=0"], "`device_memory` must be a positive number of GB, got 0.0"),
        ([*ESTIMATE, "--params=1e9", "--strategy=guess"], "guess"),
        (["completion", "fish"], "shell must be 'bash', 'zsh' or 'tcsh', got 'fish'"),
    ],
)
def test_errors_are_in_plain_words(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *arguments)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "bash"])
    script = tmp_path / "lightning-hesd"
    script.write_text(capsys.readouterr().out)
    asked = ["esti", "estimate --grad", "estimate --strategy rec", "judge --val-l"]
    lines = [f"source {script}", "function=$(complete -p lightning-hesd | sed 's/.*-F \\([^ ]*\\).*/\\1/')"]
    for words in asked:
        lines += [
            f"COMP_WORDS=(lightning-hesd {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()",
            '$function lightning-hesd "${COMP_WORDS[COMP_CWORD]}"; echo "${COMPREPLY[@]}"',
        ]
    found = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["estimate", "--gradient_seconds", "recompute", "--val-loss"]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(completion, "find_spec", lambda name: None)
    assert "shtab is not installed; pip install 'lightning-hesd[cli]'" in refused(capsys, "completion", "zsh")
    monkeypatch.delitem(sys.modules, "lightning_hesd.commands.cli")
    monkeypatch.delitem(sys.modules, "lightning_hesd.commands.plain_parser")
    monkeypatch.delattr(commands, "cli")
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit, match=r"jsonargparse is not installed; pip install 'lightning-hesd\[cli\]'"):
        __main__.main()
