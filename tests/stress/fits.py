"""`Fit`: a run with the callback beside the same run without it, declared."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_hesd import HessianSpectrumCallback
from tests.stress.harness import SECONDS, one_line, quiet
from tests.training.modules import Classifier, callback, fit, freeze, global_generators, loader


@dataclass(frozen=True)
class Fit:
    """A training run that must be the same with and without the callback; functions make what both runs need."""

    name: str
    module: Callable[[], pl.LightningModule] = Classifier
    data: Callable[[], Any] = lambda: loader(shuffle=True)
    options: Callable[[], dict[str, Any]] = dict
    trainer: Callable[[Path], dict[str, Any]] = lambda _: {}
    beside: Callable[[], list[pl.Callback]] = list  # other callbacks, of both runs
    analyses: int = 2
    failures: int = 0
    error: str = ""  # pattern of what the failures say
    check: Callable[[HessianSpectrumCallback, pl.Trainer], str] | None = None
    note: str = ""  # what the check should say
    seconds: float = SECONDS

    @property
    def expected(self) -> str:
        return _told(self.analyses, self.failures, self.error, self.note)

    def run(self, folder: Path) -> str:
        """Train without and with the callback, compare, and say what came of it."""
        reference, untouched = self._train(folder / "without")
        observer = callback(on_error="warn", **self.options())
        trainer, outcome = self._train(folder / "with", observer)
        different = [what for what, value in untouched.items() if outcome[what] != value]
        assert not different, f"training differs: {', '.join(different)}"
        assert reference.state.finished
        assert trainer.state.finished
        errors = [record.error for record in observer.history if record.error]
        seen = "" if self.check is None else self.check(observer, trainer)
        got = _told(len(observer.history), len(errors), one_line(errors[0]) if errors else "", seen)
        assert (len(observer.history), len(errors)) == (self.analyses, self.failures), got
        assert all(re.search(self.error, error) for error in errors), got
        assert seen == self.note, got
        return got

    def _train(self, folder: Path, *observers: pl.Callback) -> tuple[pl.Trainer, dict[str, Any]]:
        folder.mkdir()
        module = self.module()
        with quiet():
            trainer = fit(folder, *self.beside(), *observers, module=module, data=self.data(), **self.trainer(folder))
        return trainer, {
            "weights and buffers": freeze({k: v.detach().clone().to_dense() for k, v in _tensors(module).items()}),
            "modes": [m.training for m in module.modules()],
            "optimizers": freeze([o.state_dict().get("state") for o in trainer.optimizers]),
            "random number generators": global_generators(),
            "progress": (trainer.global_step, trainer.current_epoch),
            "metrics": freeze({k: v for k, v in trainer.callback_metrics.items() if not k.startswith("hesd")}),
        }


def _tensors(module: pl.LightningModule) -> dict[str, Any]:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: value for name, value in named.items() if value.numel()}


def _told(analyses: int, failures: int, error: str, note: str) -> str:
    parts = ["trained as without the callback", f"{analyses} analyses"]
    if failures:
        parts.append(f"{failures} failed: {error}")
    return "; ".join([*parts, note] if note else parts)
