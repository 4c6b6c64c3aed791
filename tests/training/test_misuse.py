"""What goes wrong is said clearly and early, and never costs the training."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_hesd import HessianSpectrumCallback
from lightning_hesd.training.compat import strategies
from tests.training.broken import Broken, nan_curvature, nan_loss, once_differentiable_loss, out_of_luck, raising
from tests.training.modules import (
    Classifier,
    Digits,
    callback,
    fit,
    freeze,
    loader,
    make_trainer,
    own_warnings,
    plain_loss,
)

# At construction ------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"num_samples": 0}, "`num_samples` must be a positive integer or 'auto', got 0"),
    ({"num_samples": "auto"}, "`num_samples='auto'` needs a number for `tolerance`.* got None"),
    ({"num_samples": "auto", "tolerance": "auto"}, "`num_samples='auto'` needs a number for `tolerance`.* got 'auto'"),
    ({"batch_size": -1}, "`batch_size` must be a positive integer or 'auto', got -1"),
    ({"on_error": "ignore"}, "`on_error` must be 'warn' or 'raise', got 'ignore'"),
    ({"dataloader": "val"}, "`dataloader` must be a dataloader, got 'val'"),
    ({"generalization_dataloader": "test"}, "`generalization_dataloader` must be a dataloader or 'val', got 'test'"),
    ({"every_n_epochs": 0}, "`every_n_epochs` must be a positive integer, got 0"),
    ({"every_n_train_steps": 0}, "`every_n_train_steps` must be a positive integer, got 0"),
    ({"epochs": [1, -1]}, r"`epochs` must be non-negative integers \(0-based\), got -1"),
    ({"epochs": [0.5]}, r"`epochs` must be non-negative integers \(0-based\), got 0.5"),
    ({"every_n_epochs": 2, "epochs": [1]}, "`every_n_epochs` and `epochs` exclude each other: choose one"),
    ({"epochs": [1], "every_n_train_steps": 5}, "`epochs` and `every_n_train_steps` exclude each other: choose one"),
    ({"max_overhead": -0.1}, "`max_overhead` must be a finite number above 0, got -0.1"),
    ({"max_overhead": float("nan")}, "`max_overhead` must be a finite number above 0, got nan"),
    ({"max_overhead": True}, "`max_overhead` must be a finite number above 0, got True"),
    ({"max_overhead": "5 %"}, "`max_overhead` must be a finite number above 0, got '5 %'"),
    ({"mode": "test"}, "`mode` must be 'auto' or 'eval' or 'deterministic' or 'train' or 'keep', got 'test'"),
    ({"num_samples": [64]}, r"`num_samples` must be a positive integer or 'auto', got \[64\]"),
    ({"output_fn": print}, "`output_fn` is for `matrix='ggn'` and `matrix='residual'`"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=map(str, range(len(WRONG))))
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HessianSpectrumCallback(**arguments)


def test_an_unknown_keyword_and_a_checkpoint_that_is_no_rule() -> None:
    message = r"unexpected keyword argument 'step': did you mean 'steps' or 'stop'\? The options .*steps, probes, seed"
    with pytest.raises(TypeError, match=message):
        HessianSpectrumCallback(step=5)
    for checkpoint in (ModelCheckpoint(monitor="hesd/c_t"), True):
        with pytest.raises((TypeError, MisconfigurationException), match="`checkpoint` must be"):
            HessianSpectrumCallback(checkpoint=checkpoint)


# At the start of fit --------------------------------------------------------------------------------------------------


class ByHand(Classifier):
    """Manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Streaming(Classifier):
    """Fetches its batches itself."""

    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class Late(HessianSpectrumCallback):
    """Joins the Trainer only when it sets up its callbacks, so that Lightning does not compare the names."""

    @property
    def state_key(self) -> str:
        return super().state_key if self._run._set_up_by else "another"


def of_one_name(on_error: Any) -> list[pl.Callback]:
    return [callback(), Late(steps=3, num_samples=16, checkpoint="highest_c_t", on_error=on_error)]


def one_callback(**options: Any) -> Callable[[Any], list[pl.Callback]]:
    return lambda on_error: [callback(on_error=on_error, **options)]


LOSS_FN = "pass the callback `loss_fn=`"
REFUSED: dict[str, tuple[type[Classifier], Callable[[Any], list[pl.Callback]], str]] = {
    "manual": (ByHand, one_callback(checkpoint="highest_c_t", at_start=True), LOSS_FN),
    "iterator": (Streaming, one_callback(monitor_gradients=True, verbose=True), f"`dataloader_iter`.* {LOSS_FN}"),
    "name": (Classifier, of_one_name, "another HessianSpectrumCallback.* pass another `name`"),
    "strategy": (Classifier, one_callback(max_overhead=0.5), "Refusing: use another"),
}


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_analysed_is_said_before_training(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With "warn" once, and training goes on as it would; the reason is in the records, where spectra would be."""
    module, make, message = REFUSED[case]
    if case == "strategy":  # FSDP and DeepSpeed need a GPU
        monkeypatch.setattr(strategies, "check_strategy", raising(MisconfigurationException("Refusing: use another")))
    observers = make("warn")
    with own_warnings() as said:
        trainer = fit(tmp_path, *observers, module=module(), enable_checkpointing=True)
    [text] = said
    refused: Any = observers[-1]
    assert text.startswith("lightning_hesd: there will be no spectra")
    assert re.search(message, text)
    assert {record.error for record in refused.history} == {refused.refusal}
    assert refused.refusal in text
    assert [record.epoch for record in refused.history] == ([-1, 0, 1] if case == "manual" else [0, 1])
    assert trainer.state.finished
    if case == "manual":
        assert "final weights take the place of the pick" in text
        assert trainer.checkpoint_callback is refused.checkpoint
        assert Path(refused.checkpoint.best_model_path).is_file()
    if case == "name":
        assert all(record.error is None for record in observers[0].history)
        assert refused.checkpoint not in trainer.checkpoint_callbacks
        state = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["callbacks"]
        assert "records" in state[observers[0].state_key]["history"]
    without = fit(tmp_path / "without", module=module())
    assert freeze(trainer.lightning_module.state_dict()) == freeze(without.lightning_module.state_dict())
    stopped = module()
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path / "raise", *make("raise"), module=stopped, enable_checkpointing=True)
    assert freeze(stopped.state_dict()) == freeze(module().state_dict()), "before the first step"


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
@pytest.mark.parametrize("module", [ByHand, Streaming])
def test_a_loss_function_takes_the_place_of_such_a_training_step(module: type[Classifier], tmp_path: Path) -> None:
    observer = callback(loss_fn=plain_loss)
    trained, without = (fit(tmp_path, *spectra, module=module()).lightning_module for spectra in ([observer], []))
    assert [record.error for record in observer.history] == [None, None]
    assert freeze(trained.state_dict()) == freeze(without.state_dict())


def test_a_refusal_holds_for_its_run_only(tmp_path: Path) -> None:
    observer = callback(on_error="warn")
    with pytest.warns(RuntimeWarning, match="no spectra"):
        fit(tmp_path / "first", observer, module=ByHand())
    fit(tmp_path / "second", observer)
    assert [record.error for record in observer.history] == [None, None]


# During training ------------------------------------------------------------------------------------------------------


ONCE = "cannot be differentiated twice: .*marked `once_differentiable`"
NAN = "Hessian-vector product of batch 0 is NaN or infinite, though its loss is finite"
FAILURES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "once_differentiable": ({"loss_fn": once_differentiable_loss, "strategy": "graph"}, RuntimeError, ONCE),
    "nan_curvature": ({"loss_fn": nan_curvature}, ArithmeticError, NAN),
    "nan_loss": ({"loss_fn": nan_loss}, ArithmeticError, "the loss of batch 0 is nan"),
    "any_error": ({"loss_fn": out_of_luck}, OSError, "no luck"),
    "unreadable_data": ({"dataloader": loader(Broken())}, OSError, "unreadable file"),
}


def hidden_part(module: Any, batch: Any) -> Tensor:
    """A loss whose gradient is not that of its value."""
    return plain_loss(module, batch) + module.net[0].weight.detach().square().sum()


def test_a_loss_that_cannot_be_analysed_is_warned_of_once_in_a_run(tmp_path: Path) -> None:
    observer = callback(on_error="warn", loss_fn=hidden_part)
    for run in ("first", "second"):
        with own_warnings() as said:
            fit(tmp_path / run, observer)
        [message] = said
        assert "the analysis of epoch 0 failed, training goes on. WrongDerivativeError" in message
        assert ["WrongDerivativeError" in record.error for record in observer.history] == [True, True]


@pytest.mark.parametrize("name", ["nan_curvature", "any_error", "unreadable_data"])
def test_a_failure_warns_and_training_goes_on(name: str, tmp_path: Path) -> None:
    options, error, message = FAILURES[name]
    observer = callback(on_error="warn", **options)
    with own_warnings() as messages:
        trainer = fit(tmp_path, observer, enable_checkpointing=True)
    if name == "unreadable_data":  # which is missed at the start already
        assert "cannot draw the analysis samples, will try again" in messages.pop(0)
    assert [record.spectrum for record in observer.history] == [None, None]
    error_of = observer.history[0].error
    assert messages == [f"lightning_hesd: the analysis of epoch 0 failed, training goes on. {error_of}"]
    for record in observer.history:
        assert re.match(f"{error.__name__}: .*{message}", record.error)
    assert trainer.state.finished
    assert trainer.global_step == 10
    assert not [key for key in trainer.callback_metrics if key.startswith("hesd")]
    assert Path(trainer.checkpoint_callback.best_model_path).is_file()
    without = fit(tmp_path / "without")
    assert freeze(trainer.lightning_module.state_dict()) == freeze(without.lightning_module.state_dict())


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_raised_as_it_is(name: str, tmp_path: Path) -> None:
    options, error, message = FAILURES[name]
    observer = callback(on_error="raise", **options)
    with pytest.raises(error, match=message) as caught:
        fit(tmp_path, observer)
    assert caught.type is error


@pytest.mark.parametrize("fails", ["draw", "loss"])
def test_a_passing_failure_is_overcome(fails: str, tmp_path: Path) -> None:
    """What fails once is tried again at the next analysis."""
    attempts = []

    class FlakyDigits(Digits):
        def __getitem__(self, position: int) -> Any:
            attempts.append(position)
            return out_of_luck() if fails == "draw" and len(attempts) == 1 else super().__getitem__(position)

    def loss_fn(module: Any, batch: Any) -> Tensor:
        failing = fails == "loss" and module.current_epoch == 0
        return out_of_luck() if failing else plain_loss(module, batch)

    observer = callback(on_error="warn", loss_fn=loss_fn, dataloader=loader(FlakyDigits()))
    with own_warnings() as said:
        fit(tmp_path, observer)
    assert len(said) == 1
    expected = {"draw": [None, None], "loss": ["OSError: no luck", None]}
    assert [record.error for record in observer.history] == expected[fails]
    assert observer.history[1].spectrum.num_samples == 16


class Lazy(Classifier):
    """Has layers that the first forward pass gives their shapes and weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.LazyLinear(6), torch.nn.Tanh(), torch.nn.LazyLinear(10))


def test_lazy_layers_are_not_initialized_by_an_analysis(tmp_path: Path) -> None:
    observer = callback(on_error="warn", at_start=True)
    with own_warnings() as said:
        trainer = fit(tmp_path, observer, module=Lazy())
    [message] = said
    assert "before the first step failed" in message
    first, *others = (record.error for record in observer.history)
    assert re.match(r"ValueError: parameter 'net\.0\.weight' is lazy, .*analyze after the first", first)
    assert others == [None, None]
    without = fit(tmp_path / "without", module=Lazy())
    assert freeze(trainer.lightning_module.state_dict()) == freeze(without.lightning_module.state_dict())


# Trainers of all kinds ------------------------------------------------------------------------------------------------


class Silent(Classifier):
    """Logs nothing: a barebones Trainer does not allow it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return plain_loss(self, batch)


TRAINERS: dict[str, tuple[dict[str, Any], list[tuple[int, int]]]] = {
    "fast_dev_run": ({"fast_dev_run": True}, [(0, 1)]),
    "barebones": ({"barebones": True}, [(0, 5), (1, 10)]),
    "limit_train_batches": ({"limit_train_batches": 2}, [(0, 2), (1, 4)]),
    "max_steps": ({"max_steps": 7}, [(0, 5), (1, 7)]),
    "max_steps_at_epoch_end": ({"max_steps": 5}, [(0, 5)]),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_of_all_kinds(name: str, tmp_path: Path) -> None:
    options, expected = TRAINERS[name]
    observer = callback()
    trainer = fit(tmp_path, observer, module=Silent(), data=loader(), **options)
    assert [(record.epoch, record.global_step) for record in observer.history] == expected
    assert ("hesd/c_t" in trainer.callback_metrics) == (name != "barebones")
    assert any(tmp_path.rglob("*.npz")) == (name != "fast_dev_run")


@pytest.mark.parametrize(
    ("option", "shuffle", "count"),
    [("overfit_batches", False, 16), ("limit_train_batches", False, 16), ("limit_train_batches", True, 40)],
)
def test_only_samples_that_such_a_trainer_trains_on(option: str, shuffle: bool, count: int, tmp_path: Path) -> None:
    """Of the others training sees nothing, so their loss is not the training loss."""
    observer = callback(num_samples=40)
    fit(tmp_path, observer, data=loader(shuffle=shuffle), max_epochs=1, **{option: 2})
    assert sorted(observer.state_dict()["samples"]["training"]["indices"]) == list(range(count))


@pytest.fixture
def interrupt_signal() -> Iterator[None]:
    """Lightning ignores further interrupts while it shuts down, and leaves it at that."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


class States(pl.Callback):
    """Keeps what the module is and has at the end of each epoch, before the analysis, and where training ends."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        attributes = {name for name in ("log", "log_dict", "print") if name in vars(pl_module)}
        modes, gradients = [m.training for m in pl_module.modules()], [p.grad for p in pl_module.parameters()]
        everything = [dict(pl_module.state_dict()), modes, gradients, list(pl_module.steps_seen)]
        self.states.append((freeze(everything), attributes, torch.get_rng_state().tolist()))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.on_train_epoch_end(trainer, pl_module)


@pytest.mark.parametrize("by_signal", [True, False], ids=["signal", "exception"])
@pytest.mark.usefixtures("interrupt_signal")
def test_an_interrupt_during_an_analysis(by_signal: bool, tmp_path: Path) -> None:
    """Ctrl+C is no failure of the analysis: training stops in Lightning's way, the module as training left it."""
    module = Classifier(torch.nn.BatchNorm1d(6))
    module.steps_seen = [0]

    def interrupted(pl_module: Any, batch: Any) -> Tensor:
        pl_module.net[1].running_mean += torch.rand(6)
        pl_module.steps_seen.append(1)
        pl_module.log("never", 1.0)
        if by_signal:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):  # until Python gets to the signal
                pass
        raise KeyboardInterrupt

    observer, kept = callback(loss_fn=interrupted, on_error="warn"), States()
    trainer = make_trainer(tmp_path, kept, observer)
    with pytest.raises(SystemExit):
        trainer.fit(module, loader())
    assert trainer.interrupted
    assert len(kept.states) == 2
    assert kept.states[0] == kept.states[1]
    assert not observer.history
