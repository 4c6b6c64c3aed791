"""Callback and checkpoint configured by LightningCLI: every kind of option, errors, and saved files."""

import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader

from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback, SharpnessMonitor, hessian_spectrum
from lightning_hesd.commands.cli import main as command
from tests.training import cli_project

PROJECT = "tests.training.cli_project"


@pytest.fixture(autouse=True)
def only_our_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["train"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 with jsonargparse 4.53
    monkeypatch.chdir(tmp_path)


def configuration(*callbacks: dict[str, Any], **trainer: Any) -> str:
    """Return the file of a run of the project in `cli_project` with these callbacks."""
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}}
    config = {
        "seed_everything": 3,
        "trainer": {**quiet, "logger": logger, "max_epochs": 2, "callbacks": list(callbacks), **trainer},
        "model": {"class_path": f"{PROJECT}.Net", "init_args": {"width": 4}},
        "data": {"class_path": f"{PROJECT}.Data", "init_args": {"size": 24}},
    }
    return yaml.safe_dump(config)


def spectra_config(**init_args: Any) -> dict[str, Any]:
    return {"class_path": "lightning_hesd.HessianSpectrumCallback", "init_args": init_args}


def checkpoint_config(**init_args: Any) -> dict[str, Any]:
    return {"class_path": "lightning_hesd.HessianCheckpoint", "init_args": init_args}


def cli(config: str | Path, *args: str, run: bool = False) -> LightningCLI:
    if isinstance(config, str):
        Path("given.yaml").write_text(config)
        config = Path("given.yaml")
    given = [*(["fit"] if run else []), "--config", str(config), *args]
    classes = {"subclass_mode_model": True, "subclass_mode_data": True}
    return LightningCLI(pl.LightningModule, pl.LightningDataModule, run=run, args=given, **classes)


def only(trainer: Any, kind: type) -> Any:
    [found] = [callback for callback in trainer.callbacks if isinstance(callback, kind)]
    return found


READ: dict[str, Callable[[Any], Any]] = {
    "every_n_epochs": lambda c: c.schedule.every_n_epochs,
    "epochs": lambda c: [epoch for epoch in range(9) if c.schedule.includes_epoch(epoch)],
    "num_samples": lambda c: "auto" if c._recorder._analyzers["training"].samples.grows else None,
    "loss_fn": lambda c: c.loss_fn,
    "layers": lambda c: c._recorder._layers,
    "preconditioner": lambda c: c._recorder._preconditioner,
    "checkpoint": lambda c: [(each.rule, each.selection.tolerance, each.save_last) for each in c.checkpoints],
    "decompose": lambda c: c._recorder._decomposition is not None,
    "output_fn": lambda c: c._recorder._decomposition["output_fn"],
    "output_loss": lambda c: c._recorder._decomposition["output_loss"],
    "generalization_dataloader": lambda c: described(c._recorder._analyzers["generalization"].samples._dataloader),
}
"""Where the callback has an option; the others are among its options of the analysis."""


def described(loader: Any) -> Any:
    return (len(loader.dataset), loader.batch_size) if isinstance(loader, DataLoader) else loader


def of_project(name: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": f"{PROJECT}.{name}", "init_args": init_args}


def as_given(**options: Any) -> dict[str, tuple[Any, Any]]:
    return {name: (value, value) for name, value in options.items()}


CALLBACKS: list[dict[str, tuple[Any, Any]]] = [  # options as a configuration gives them, and as they arrive
    {
        **as_given(every_n_epochs=3, tolerance="type", mode="train", probes=2, batch_weight="tokens", layers="auto"),
        **as_given(preconditioner="optimizer", generalization_dataloader="val"),
        "dtype": ("torch.float64", torch.float64),
        "parameters": (f"{PROJECT}.without_biases", cli_project.without_biases),
        "loss_fn": (f"{PROJECT}.plain_loss", cli_project.plain_loss),
        "checkpoint": ("lowest_max_eigenvalue", [("lowest_max_eigenvalue", 0.0, None)]),
    },
    {
        **as_given(epochs=[0, 4], num_samples="auto", tolerance=0.1, layers=["net.0", "net.*"]),
        "loss_fn": (f"{PROJECT}.loss", cli_project.loss),
        "batch_weight": (f"{PROJECT}.weight", cli_project.weight),
        "checkpoint": (
            checkpoint_config(rule=f"{PROJECT}.negated_loss", tolerance=0.2, save_last=True),
            [(cli_project.negated_loss, 0.2, True)],
        ),
        "generalization_dataloader": (of_project("FirstDigits", size=7), (7, 5)),
    },
    {
        "checkpoint": (["highest_c_t", "lowest_trace"], [("highest_c_t", 0.0, None), ("lowest_trace", 0.0, None)]),
        "loss_fn": (of_project("Loss", scale=2.0), cli_project.Loss(2.0)),
        "layers": ("torch.nn.Linear", nn.Linear),
    },
    {
        **as_given(decompose=True),
        "layers": (["torch.nn.Linear", "net.1"], [nn.Linear, "net.1"]),
        "output_fn": (f"{PROJECT}.plain_loss", cli_project.plain_loss),
        "output_loss": (f"{PROJECT}.loss", cli_project.loss),
    },
]


@pytest.mark.parametrize("options", CALLBACKS, ids=["names", "objects", "classes", "terms"])
def test_options_arrive(options: dict[str, tuple[Any, Any]]) -> None:
    parser = cli(configuration(spectra_config(**{name: given for name, (given, _) in options.items()})))
    with warnings.catch_warnings(record=True) as complaints:  # as an error, jsonargparse would take it for a mismatch
        warnings.simplefilter("always")
        saved = parser.parser.dump(parser.config, skip_none=False)
    assert [str(complaint.message) for complaint in complaints] == []
    for trainer in (parser.trainer, cli(saved).trainer):
        callback = only(trainer, HessianSpectrumCallback)
        for name, (_, expected) in options.items():
            found = READ[name](callback) if name in READ else getattr(callback.options, name)
            assert found == expected, name


def test_options_on_the_command_line() -> None:
    config = configuration(spectra_config(steps=5))
    found = only(cli(config, "--trainer.callbacks.steps=9").trainer, HessianSpectrumCallback)
    assert found.options.steps == 9


UNREADABLE: list[tuple[dict[str, Any], str]] = [
    (spectra_config(step=5), "Option 'step' is not accepted"),
    (spectra_config(steps="many"), r'key "steps":\s+Expected a <class \'int\'>'),
    (
        spectra_config(mode="test"),
        r"key \"mode\":\s+Expected a typing.Literal\['auto', 'eval', 'deterministic', 'train', 'keep'\]",
    ),
    (spectra_config(loss_fn="nowhere.loss"), 'key "loss_fn":(.|\n)*nowhere.loss'),
    (spectra_config(dataloader="val"), r"key \"dataloader\":(.|\n)*Given value: val"),
    (spectra_config(generalization_dataloader="test"), r"key \"generalization_dataloader\":(.|\n)*Literal\['val'\]"),
    (spectra_config(checkpoint="best"), r"key \"checkpoint\":(.|\n)*Literal\['highest_c_t', 'lowest_max_eigenvalue', "),
    (spectra_config(checkpoint=checkpoint_config(monitor="x")), "Option 'monitor' is not accepted"),
    (checkpoint_config(every_n_epochs=2), "Option 'every_n_epochs' is not accepted"),
]


@pytest.mark.parametrize(("callback", "message"), UNREADABLE, ids=[str(n) for n in range(len(UNREADABLE))])
def test_wrong_names_and_types_end_the_command(
    callback: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli(configuration(callback))
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_wrong_values_are_said_as_in_python() -> None:
    with pytest.raises(ValueError, match="`every_n_epochs` and `epochs` exclude each other"):
        cli(configuration(spectra_config(every_n_epochs=2, epochs=[1])))


def printed(config: str | Path, option: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli(config, option)
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_print_config_shows_all_options_and_can_be_read_again(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"loss_fn": f"{PROJECT}.plain_loss", "dtype": "torch.float64"}
    others = {"layers": ["torch.nn.Linear"], "checkpoint": checkpoint_config(rule=f"{PROJECT}.negated_loss")}
    text = printed(configuration(spectra_config(**given, **others)), "--print_config", capsys)
    assert "<" not in text
    [callback] = yaml.safe_load(text)["trainer"]["callbacks"]
    shown = callback["init_args"]
    defaults = {
        name: parameter.default
        for function in (hessian_spectrum, HessianSpectrumCallback)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name not in {"module", "batches"}
    }
    assert set(shown) == set(defaults)
    for key, value in (defaults | given).items():
        assert key in others or shown[key] == value, key
    assert shown["checkpoint"]["init_args"]["rule"] == f"{PROJECT}.negated_loss"
    assert not set(shown["checkpoint"]["init_args"]) & {"monitor", "every_n_epochs", "save_top_k"}
    assert printed(text, "--print_config", capsys) == text


def test_help_knows_types_and_meanings(capsys: pytest.CaptureFixture[str]) -> None:
    option = "--trainer.callbacks.help=lightning_hesd.HessianSpectrumCallback"
    text = " ".join(printed(configuration(), option, capsys).split())
    assert "Unvalidated" not in text
    assert "Number of independent start vectors. (type: int, default: 1)" in text
    assert "(type: Union[float, Literal['type', 'auto'], null], default: null)" in text


@pytest.mark.filterwarnings("ignore:none of the epochs:RuntimeWarning")
def test_a_run_can_be_repeated_and_analysed_from_its_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"generalization_dataloader": "val", "preconditioner": "optimizer", "layers": ["torch.nn.Linear"]}
    options |= {"parameters": f"{PROJECT}.without_biases", "loss_fn": f"{PROJECT}.plain_loss"}
    rule = checkpoint_config(tolerance=9.0, require_mp=False)
    spectra = spectra_config(**options, num_samples=16, steps=6, on_error="raise", checkpoint=rule)
    first = cli(configuration(spectra, max_epochs=1), run=True).trainer
    records = only(first, HessianSpectrumCallback).history
    assert [record.epoch for record in records] == [0]
    assert {spectrum.steps for spectrum in records[-1].spectra.values()} == {6}
    assert records[-1].spectrum.dimension == 4 * 64 + 10 * 4
    assert {name: layer.dimension for name, layer in records[-1].layers.items()} == {"net.0": 4 * 64, "net.2": 10 * 4}
    assert records[-1].assessment is not None
    assert records[-1].preconditioned is not None
    best = Path(only(first, HessianCheckpoint).best_model_path)
    assert best.exists()

    saved = Path(first.log_dir) / "config.yaml"
    again = only(cli(saved, run=True).trainer, HessianSpectrumCallback).history
    for one, other in zip(records, again, strict=True):
        np.testing.assert_array_equal(one.spectrum.nodes, other.spectrum.nodes)
        np.testing.assert_array_equal(one.generalization.nodes, other.generalization.nodes)

    arguments = [best, "--config", saved, "--out", "out", "--accelerator=cpu", "--analysis.steps=6"]
    command(["analyze", *map(str, arguments)])
    assert "[1/1]" in capsys.readouterr().out


def test_a_checkpoint_and_a_monitor_beside_the_callback() -> None:
    checkpoint = checkpoint_config(rule="lowest_max_eigenvalue", require_mp=False, dirpath="kept")
    monitor = {"class_path": "lightning_hesd.SharpnessMonitor", "init_args": {"every_n_train_steps": 2, "seed": 3}}
    trainer = cli(configuration(spectra_config(num_samples=8, steps=3), checkpoint, monitor), run=True).trainer
    tracked = only(trainer, SharpnessMonitor)
    assert (tracked.every_n_train_steps, tracked._analyzer._options.seed) == (2, 3)
    assert tracked.history
    rule = only(trainer, HessianCheckpoint)
    assert rule.source is only(trainer, HessianSpectrumCallback)
    assert Path(rule.best_model_path).parent.name == "kept"
    assert Path(rule.best_model_path).exists()
