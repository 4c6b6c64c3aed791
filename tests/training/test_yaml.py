"""Callback and checkpoint configured by LightningCLI: every kind of option, errors, and saved files."""

from __future__ import annotations

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

from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback, hessian_spectrum
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
    config = {
        "seed_everything": 3,
        "trainer": {**quiet, "max_epochs": 2, "default_root_dir": "runs", "callbacks": list(callbacks), **trainer},
        "model": {"class_path": f"{PROJECT}.Net", "init_args": {"width": 4}},
        "data": {"class_path": f"{PROJECT}.Data", "init_args": {"size": 24}},
    }
    return yaml.safe_dump(config)


def spectra_config(**init_args: Any) -> dict[str, Any]:
    return {"class_path": "lightning_hesd.HessianSpectrumCallback", "init_args": init_args}


def cli(config: str | Path, *args: str, run: bool = False) -> LightningCLI:
    if isinstance(config, str):
        Path("given.yaml").write_text(config)
        config = Path("given.yaml")
    return LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=run,
        args=[*(["fit"] if run else []), "--config", str(config), *args],
    )


def only(trainer: Any, kind: type) -> Any:
    [found] = [callback for callback in trainer.callbacks if isinstance(callback, kind)]
    return found


def parsed(**init_args: Any) -> HessianSpectrumCallback:
    found: HessianSpectrumCallback = only(
        cli(configuration(spectra_config(**init_args))).trainer, HessianSpectrumCallback
    )
    return found


# Options of every kind ------------------------------------------------------------------------------------------------

KINDS: list[tuple[dict[str, Any], Callable[[Any], bool]]] = [
    ({"every_n_epochs": 3}, lambda c: c.schedule.every_n_epochs == 3),
    ({"epochs": [0, 4]}, lambda c: [e for e in range(9) if c.schedule.includes_epoch(e)] == [0, 4]),
    ({"num_samples": "auto", "tolerance": 0.1}, lambda c: c._recorder._analyzers["training"].samples.grows),
    ({"tolerance": "type"}, lambda c: c.options.tolerance == "type"),
    (
        {"steps": 7, "probes": 2, "mode": "train"},
        lambda c: (c.options.steps, c.options.probes, c.options.mode) == (7, 2, "train"),
    ),
    ({"dtype": "torch.float64"}, lambda c: c.options.dtype is torch.float64),
    ({"parameters": f"{PROJECT}.without_biases"}, lambda c: c.options.parameters is cli_project.without_biases),
    ({"loss_fn": f"{PROJECT}.loss"}, lambda c: c.loss_fn is cli_project.loss),
    ({"loss_fn": f"{PROJECT}.plain_loss"}, lambda c: c.loss_fn is cli_project.plain_loss),
    (
        {"loss_fn": {"class_path": f"{PROJECT}.Loss", "init_args": {"scale": 2.0}}},
        lambda c: isinstance(c.loss_fn, cli_project.Loss) and c.loss_fn.scale == 2.0,
    ),
    ({"batch_weight": "tokens"}, lambda c: c.options.batch_weight == "tokens"),
    ({"batch_weight": f"{PROJECT}.weight"}, lambda c: c.options.batch_weight is cli_project.weight),
    ({"layers": "auto"}, lambda c: c._recorder._layers == "auto"),
    ({"layers": ["net.0", "net.*"]}, lambda c: c._recorder._layers == ["net.0", "net.*"]),
    ({"layers": "torch.nn.Linear"}, lambda c: c._recorder._layers is nn.Linear),
    ({"layers": ["torch.nn.Linear", "net.1"]}, lambda c: c._recorder._layers == [nn.Linear, "net.1"]),
    ({"preconditioner": "optimizer"}, lambda c: c._recorder._preconditioner == "optimizer"),
    ({"checkpoint": "lowest_max_eigenvalue"}, lambda c: c.checkpoint.rule == "lowest_max_eigenvalue"),
    (
        {
            "checkpoint": {
                "class_path": "lightning_hesd.HessianCheckpoint",
                "init_args": {"rule": f"{PROJECT}.negated_loss", "tolerance": 0.2, "save_last": True},
            }
        },
        lambda c: (
            (c.checkpoint.rule, c.checkpoint.selection.tolerance, c.checkpoint.save_last)
            == (cli_project.negated_loss, 0.2, True)
        ),
    ),
    (
        {
            "decompose": True,
            "output_fn": f"{PROJECT}.plain_loss",
            "output_loss": f"{PROJECT}.loss",
        },
        lambda c: c._recorder._decomposition == {"output_fn": cli_project.plain_loss, "output_loss": cli_project.loss},
    ),
    (
        {"generalization_dataloader": "val"},
        lambda c: c._recorder._analyzers["generalization"].samples._dataloader == "val",
    ),
    (
        {
            "generalization_dataloader": {
                "class_path": f"{PROJECT}.FirstDigits",
                "init_args": {"size": 7},
            }
        },
        lambda c: (
            isinstance(loader := c._recorder._analyzers["generalization"].samples._dataloader, DataLoader)
            and (len(loader.dataset), loader.batch_size) == (7, 5)
        ),
    ),
]


@pytest.mark.parametrize(("init_args", "arrived"), KINDS, ids=["-".join(a) + f"_{n}" for n, (a, _) in enumerate(KINDS)])
def test_options_arrive(init_args: dict[str, Any], arrived: Callable[[Any], bool]) -> None:
    parser = cli(configuration(spectra_config(**init_args)))
    assert arrived(only(parser.trainer, HessianSpectrumCallback))
    with warnings.catch_warnings(record=True) as complaints:  # as an error, jsonargparse would take it for a mismatch
        warnings.simplefilter("always")
        saved = parser.parser.dump(parser.config, skip_none=False)
    assert [str(complaint.message) for complaint in complaints] == []
    assert arrived(only(cli(saved).trainer, HessianSpectrumCallback))


def test_options_on_the_command_line() -> None:
    config = configuration(spectra_config(steps=5))
    found = only(cli(config, "--trainer.callbacks.steps=9").trainer, HessianSpectrumCallback)
    assert found.options.steps == 9


# Errors ---------------------------------------------------------------------------------------------------------------

UNREADABLE: list[tuple[dict[str, Any], str]] = [
    (spectra_config(step=5), "Option 'step' is not accepted"),
    (spectra_config(steps="many"), r'key "steps":\s+Expected a <class \'int\'>'),
    (spectra_config(at_start=3), r'key "at_start":\s+Expected a <class \'bool\'>'),
    (
        spectra_config(mode="test"),
        r"key \"mode\":\s+Expected a typing.Literal\['auto', 'eval', 'deterministic', 'train', 'keep'\]",
    ),
    (spectra_config(loss_fn="nowhere.loss"), 'key "loss_fn":(.|\n)*nowhere.loss'),
    (spectra_config(dataloader="val"), r"key \"dataloader\":(.|\n)*Given value: val"),
    (spectra_config(generalization_dataloader="test"), r"key \"generalization_dataloader\":(.|\n)*Literal\['val'\]"),
    (spectra_config(preconditioner="adam"), r"key \"preconditioner\":(.|\n)*Literal\['optimizer'\]"),
    (spectra_config(checkpoint="best"), r"key \"checkpoint\":(.|\n)*Literal\['highest_c_t', 'lowest_max_eigenvalue'\]"),
    (
        spectra_config(checkpoint={"class_path": "lightning_hesd.HessianCheckpoint", "init_args": {"monitor": "x"}}),
        "Option 'monitor' is not accepted",
    ),
    (
        {"class_path": "lightning_hesd.HessianCheckpoint", "init_args": {"every_n_epochs": 2}},
        "Option 'every_n_epochs' is not accepted",
    ),
]


@pytest.mark.parametrize(("callback", "message"), UNREADABLE, ids=[str(n) for n in range(len(UNREADABLE))])
def test_wrong_names_and_types_end_the_command(
    callback: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli(configuration(callback))
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("init_args", "message"),
    [
        ({"tolerance": 1.5}, "`tolerance` must be a number between 0 and 1, 'type', 'auto' or None, got 1.5"),
        ({"every_n_epochs": 2, "epochs": [1]}, "`every_n_epochs` and `epochs` exclude each other"),
        ({"decompose": True}, r"needs `output_fn\(module, batch\)`"),
    ],
)
def test_wrong_values_are_said_as_in_python(init_args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(**init_args)


# Configurations that come back ----------------------------------------------------------------------------------------


def printed(config: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli(config, "--print_config")
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_print_config_shows_all_options_and_can_be_read_again(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = {"class_path": "lightning_hesd.HessianCheckpoint", "init_args": {"rule": f"{PROJECT}.negated_loss"}}
    given = {
        "loss_fn": f"{PROJECT}.plain_loss",
        "layers": ["torch.nn.Linear"],
        "dtype": "torch.float64",
        "checkpoint": checkpoint,
    }
    text = printed(configuration(spectra_config(**given)), capsys)
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
    assert {key: value for key, value in shown.items() if key not in given} == {
        key: value for key, value in defaults.items() if key not in given
    }
    assert {key: shown[key] for key in given if key not in {"layers", "checkpoint"}} == {
        "loss_fn": f"{PROJECT}.plain_loss",
        "dtype": "torch.float64",
    }
    assert shown["checkpoint"]["init_args"]["rule"] == f"{PROJECT}.negated_loss"
    assert not set(shown["checkpoint"]["init_args"]) & {"monitor", "every_n_epochs", "save_top_k"}
    assert printed(text, capsys) == text


def test_help_knows_types_and_meanings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli(configuration(), "--trainer.callbacks.help=lightning_hesd.HessianSpectrumCallback")
    text = " ".join(capsys.readouterr().out.split())
    assert "Unvalidated" not in text
    assert "Number of independent start vectors. (type: int, default: 1)" in text
    assert "(type: Union[float, Literal['type', 'auto'], null], default: null)" in text


@pytest.mark.filterwarnings("ignore:none of the epochs:RuntimeWarning")
def test_a_run_can_be_repeated_and_analysed_from_its_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    spectra = spectra_config(
        num_samples=16,
        steps=6,
        parameters=f"{PROJECT}.without_biases",
        loss_fn=f"{PROJECT}.plain_loss",
        layers=["torch.nn.Linear"],
        generalization_dataloader="val",
        preconditioner="optimizer",
        on_error="raise",
        checkpoint={
            "class_path": "lightning_hesd.HessianCheckpoint",
            "init_args": {"tolerance": 9.0, "require_mp": False},
        },
    )
    first = cli(configuration(spectra), run=True).trainer
    records = only(first, HessianSpectrumCallback).history
    assert [record.epoch for record in records] == [0, 1]
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


def test_a_checkpoint_beside_the_callback() -> None:
    checkpoint = {
        "class_path": "lightning_hesd.HessianCheckpoint",
        "init_args": {"rule": "lowest_max_eigenvalue", "require_mp": False, "dirpath": "kept"},
    }
    trainer = cli(configuration(spectra_config(num_samples=8, steps=3), checkpoint), run=True).trainer
    rule = only(trainer, HessianCheckpoint)
    assert rule.source is only(trainer, HessianSpectrumCallback)
    assert Path(rule.best_model_path).parent.name == "kept"
    assert Path(rule.best_model_path).exists()
