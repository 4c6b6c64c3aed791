"""A Trainer of `pytorch_lightning` works as one of `lightning.pytorch` does, with the same callbacks in one process.

All other tests use `lightning.pytorch`; here its Trainer is used where something is asked of both.
"""

import ast
import functools
import importlib
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

import lightning_hesd
from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback
from lightning_hesd.commands.cli import main
from lightning_hesd.training.compat import strategies
from lightning_hesd.training.compat.namespaces import lightning_types, namespace_of
from lightning_hesd.training.isolation import kinds
from lightning_hesd.training.samples.loaders import is_combined
from lightning_hesd.training.samples.reading import _has_own_init
from tests.programs import run_python
from tests.training import modules
from tests.training.logs import read_csv, read_events
from tests.training.namespace_project import DATA, NAMESPACES, NETS, loader

QUIET = {**modules.QUIET, "log_every_n_steps": 1}
ANALYSIS: dict[str, Any] = {"num_samples": 16, "steps": 6, "on_error": "raise"}
BOTH = pytest.mark.parametrize("name", NAMESPACES)
OTHER = "pytorch_lightning"

pytestmark = [
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def spectra(**arguments: Any) -> HessianSpectrumCallback:
    return HessianSpectrumCallback(**{**ANALYSIS, **arguments})


def trainer_of(name: str, folder: Path, *callbacks: Any, epochs: int = 2, **arguments: Any) -> Any:
    options = {**QUIET, "max_epochs": epochs, "callbacks": list(callbacks), **arguments}
    return NAMESPACES[name].Trainer(default_root_dir=folder, **options)


def fit(name: str, folder: Path, *callbacks: Any, ckpt_path: Any = None, **arguments: Any) -> Any:
    trainer = trainer_of(name, folder, *callbacks, **arguments)
    trainer.fit(NETS[name](), loader(), loader(), ckpt_path=ckpt_path)
    return trainer


def found(callback: HessianSpectrumCallback) -> list[tuple[Any, ...]]:
    return [(r.epoch, r.global_step, r.spectrum.c_t, r.spectrum.lambda_max) for r in callback.history]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """What a run of three epochs with `lightning.pytorch` finds."""
    callback = spectra()
    fit("lightning.pytorch", tmp_path_factory.mktemp("expected"), callback, epochs=3)
    return found(callback)


def test_fit_log_pick_test_and_resume(tmp_path: Path, expected: list[Any]) -> None:
    name, namespace = OTHER, NAMESPACES[OTHER]
    loggers = [namespace.loggers.TensorBoardLogger(tmp_path), namespace.loggers.CSVLogger(tmp_path, name="csv")]
    callback = spectra(checkpoint=HessianCheckpoint(save_last=True, tolerance=9.0))
    trainer = fit(name, tmp_path, callback, logger=loggers)
    pick = callback.checkpoint
    assert found(callback) == expected[:2]
    without = fit(name, tmp_path / "plain")
    assert all(map(torch.equal, trainer.lightning_module.parameters(), without.lightning_module.parameters()))

    events = read_events(loggers[0].log_dir)
    assert {"hesd/c_t", "hesd/lambda_max", "train_loss"} <= set(events.Tags()["scalars"])
    assert events.Tags()["histograms"] == ["hesd/density"]
    assert events.Tags()["images"] == ["hesd/density_figure"]
    assert {"custom_scalars__config__", "hesd/record"} <= set(events.Tags()["tensors"])
    logged = [row["hesd/c_t"] for row in read_csv(Path(loggers[1].log_dir, "metrics.csv")) if row["hesd/c_t"]]
    assert list(map(float, logged)) == pytest.approx([e[2] for e in expected[:2]])
    assert Path(loggers[1].log_dir, "hesd_density.csv").exists()
    assert Path(loggers[0].log_dir, "hesd").is_dir()

    assert trainer.checkpoint_callback is pick
    trainer.test(NETS[name](), loader(), ckpt_path="best", verbose=False)
    assert trainer.ckpt_path == pick.best_model_path == pick.best.path
    saved = torch.load(pick.last_model_path)["callbacks"]
    assert {callback.state_key, pick.state_key} <= saved.keys()

    again = spectra(checkpoint=HessianCheckpoint(tolerance=9.0))
    with pytest.warns(UserWarning, match="The dirpath has changed"):  # of Lightning's own ModelCheckpoint
        fit(name, tmp_path, again, epochs=3, ckpt_path=pick.last_model_path)
    assert found(again) == expected
    assert len(again.checkpoint.candidates) >= len(pick.candidates)


def test_the_same_callbacks_in_both_namespaces(tmp_path: Path, expected: list[Any]) -> None:
    callback = spectra(checkpoint="highest_c_t")
    alone = HessianCheckpoint("lowest_max_eigenvalue")
    for number, name in enumerate([OTHER, "lightning.pytorch", OTHER]):
        trainer = fit(name, tmp_path / str(number), callback, alone)
        assert found(callback) == expected[:2]
        assert trainer.checkpoint_callbacks == [callback.checkpoint, alone]
        for checkpoint in trainer.checkpoint_callbacks:
            assert Path(checkpoint.best_model_path).is_relative_to(tmp_path / str(number))


def test_a_run_goes_on_in_the_other_namespace(tmp_path: Path, expected: list[Any]) -> None:
    first = spectra(checkpoint=HessianCheckpoint(save_last=True))
    fit("lightning.pytorch", tmp_path, first)
    second = spectra(checkpoint=HessianCheckpoint(save_last=True))
    fit("pytorch_lightning", tmp_path, second, epochs=3, ckpt_path=first.checkpoint.last_model_path)
    assert found(second) == expected


@BOTH
def test_the_constructor_of_the_trainer_knows_the_callbacks(name: str, tmp_path: Path) -> None:
    namespace = NAMESPACES[name]
    users, pick = namespace.callbacks.ModelCheckpoint(), HessianCheckpoint()
    trainer = trainer_of(name, tmp_path, users, pick, spectra())
    assert trainer.checkpoint_callbacks == [users, pick]
    trainer.fit(NETS[name](), loader(), loader())
    assert set(trainer.callbacks[-2:]) == set(trainer.checkpoint_callbacks) == {users, pick}
    alone = trainer_of(name, tmp_path, HessianCheckpoint(), spectra())
    assert len(alone.checkpoint_callbacks) == 1  # no ModelCheckpoint of Lightning's beside it
    with pytest.raises(namespace.utilities.exceptions.MisconfigurationException, match="enable_checkpointing=False"):
        trainer_of(name, tmp_path, HessianCheckpoint(), enable_checkpointing=False)
    single = spectra()
    assert namespace.Trainer(callbacks=single, **QUIET).callbacks[0] is single


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_two_ranks(tmp_path: Path) -> None:
    callback = spectra(checkpoint="highest_c_t", dataloader=loader())
    trainer = fit(OTHER, tmp_path, callback, strategy="ddp_fork", devices=2)
    assert [record.error for record in callback.history] == [None, None]
    assert trainer.callback_metrics["hesd/c_t"] == pytest.approx(callback.history[1].spectrum.c_t)
    assert Path(callback.checkpoint.best.path).exists()
    assert callback.checkpoint.best.path == callback.checkpoint.best_model_path


def test_no_class_of_lightning_is_asked_for_by_its_import() -> None:
    """`isinstance` with an imported class knows one namespace only; `namespaces.py` has the classes of both."""
    found, asked = [], 0
    for path in Path(lightning_hesd.__file__).parent.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imports = [
            n for n in nodes if isinstance(n, ast.ImportFrom) and re.match("(pytorch_)?lightning[.]", n.module or "")
        ]
        imported = {alias.asname or alias.name for n in imports for alias in n.names} | {"pl"}
        for call in (n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)):
            if call.func.id in {"isinstance", "issubclass"}:
                asked += 1
                names = {n.id for n in ast.walk(call.args[1]) if isinstance(n, ast.Name)}
                found += [f"{path.name}:{call.lineno}"] if names & imported else []
    assert found == []
    assert asked > 100


@BOTH
def test_objects_of_either_namespace_are_told_apart(name: str, tmp_path: Path) -> None:
    namespace = NAMESPACES[name]
    assert namespace.callbacks.TQDMProgressBar() not in kinds.SearchedObjects()  # it moves by itself
    assert kinds.is_outside_module(namespace.callbacks.EarlyStopping("x"))
    assert kinds.is_outside_module(DATA[name]())
    assert kinds.is_logger(namespace.loggers.CSVLogger("x"))
    refusal = namespace.utilities.exceptions.MisconfigurationException  # by which its users catch ours
    sharded = object.__new__(namespace.strategies.FSDPStrategy)
    with pytest.raises(refusal, match="FSDPStrategy shards the parameters"):
        strategies.check_strategy(SimpleNamespace(strategy=sharded))  # type: ignore[arg-type]
    parallel = object.__new__(namespace.strategies.ModelParallelStrategy)
    assert strategies.is_sharded(SimpleNamespace(strategy=parallel))  # type: ignore[arg-type]
    assert is_combined(namespace.utilities.CombinedLoader([loader()]))
    initialize = inspect.getmodule(namespace.seed_everything).pl_worker_init_function  # type: ignore[union-attr]
    assert not _has_own_init(DataLoader([], worker_init_fn=functools.partial(initialize, rank=0)))
    assert namespace_of(trainer_of(name, tmp_path)) is namespace_of(NETS[name]()) is namespace


def test_names_that_a_version_lacks_are_passed_over() -> None:
    assert lightning_types("callbacks.NoSuchThing", "Trainer") == tuple(n.Trainer for n in NAMESPACES.values())
    with pytest.raises(TypeError, match=r"expected an object of lightning.pytorch or pytorch_lightning, got int of"):
        namespace_of(1)


def test_lightning_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["main"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 with jsonargparse 4.53
    checkpoint = {"class_path": "lightning_hesd.HessianCheckpoint", "init_args": {"dirpath": str(tmp_path)}}
    arguments = {"checkpoint": checkpoint, "num_samples": 16, "on_error": "raise"}
    callback = {"class_path": "lightning_hesd.HessianSpectrumCallback", "init_args": arguments}
    trainer = {**QUIET, "max_epochs": 1, "default_root_dir": str(tmp_path), "callbacks": [callback]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 1, "trainer": trainer}))
    cli, net, data = importlib.import_module(f"{OTHER}.cli"), NETS[OTHER], DATA[OTHER]
    config = ["fit", "--config", str(tmp_path / "config.yaml")]
    ran = cli.LightningCLI(net, data, args=config, save_config_callback=None).trainer
    path = ran.checkpoint_callback.best_model_path
    assert isinstance(ran.checkpoint_callback, HessianCheckpoint)

    # And the command line of this package, on the checkpoint.
    model = ["--model", f"{net.__module__}.{net.__name__}", "--data", f"{data.__module__}.{data.__name__}"]
    capsys.readouterr()
    main(["analyze", path, *model, "--accelerator=cpu", "--analysis.steps=6", "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    [callback_of_run] = [c for c in ran.callbacks if isinstance(c, HessianSpectrumCallback)]
    assert results["table"][0]["loss"] == pytest.approx(callback_of_run.history[0].spectrum.loss)
    assert "GPU available" not in capsys.readouterr().err


def test_the_other_namespace_is_joined_when_it_has_been_imported_and_not_before() -> None:
    seen = json.loads(run_python(str(Path(__file__).with_name("late_import.py"))))
    assert seen == {"imported by itself": [], "known": [True] * 4}
