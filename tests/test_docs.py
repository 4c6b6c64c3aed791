"""The code of the README and of the documentation runs as it stands there."""

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hesd import HessianSpectrumCallback
from lightning_hesd.commands.cli import main
from lightning_hesd.numerics.inputs.options import AnalysisOptions
from tests.training import cli_project

README = Path(__file__).parents[1] / "README.md"
PAGES = sorted((README.parent / "docs").rglob("*.md"))
EPOCHS, STEPS = 1, 30
"""Of pages that train longer, or analyze with the default number of steps."""


class Plain(LightningModule):
    """The LightningModule of a user who has never heard of Hessians."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class Short(Trainer):
    """Trains for one epoch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "max_epochs": EPOCHS})


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=20)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def names() -> dict[str, Any]:
    """Return what pages take for granted."""
    torch.manual_seed(0)
    return {"model": Plain(), "train_dataloader": data(), "val_dataloader": data(), "test_dataloader": data()}


@pytest.mark.filterwarnings("ignore:GPU available but not used")
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
@pytest.mark.filterwarnings("ignore:.*failed, training goes on")  # what a page is about
@pytest.mark.parametrize("page", [README, *(p for p in PAGES if blocks(p, "python"))], ids=lambda page: page.stem)
def test_python_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning.pytorch.Trainer", Short)
    if page != README:  # to save time
        monkeypatch.setattr("lightning_hesd.training.loggers.tensorboard.figures", lambda history: ())
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: Path(path).touch())
    monkeypatch.setitem(AnalysisOptions.__init__.__kwdefaults__, "steps", STEPS)
    namespace = names()
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)  # noqa: S102
    found = namespace.get("callback")
    if page.stem == "failures":
        assert found.history[-1].error in page.read_text(encoding="utf-8")
    elif found is not None:
        assert found.history[-1].error is None
    if page in {README, README.parent / "docs" / "index.md"}:
        trainer = namespace["trainer"]
        (first,) = (c for c in trainer.callbacks if isinstance(c, HessianSpectrumCallback))
        assert [record.error for record in first.history] == [None] * EPOCHS
        assert Path(trainer.checkpoint_callback.best_model_path).is_file()
        assert "test_loss" in trainer.callback_metrics


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's folder with a module `my`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "my", cli_project)
    monkeypatch.setattr(cli_project, "Module", cli_project.Net, raising=False)
    monkeypatch.setattr(cli_project, "DataModule", cli_project.Data, raising=False)


@pytest.mark.usefixtures("project")
@pytest.mark.filterwarnings("ignore:GPU available but not used")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=lambda page: page.stem)
def test_configuration_of_a_page_trains(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 with jsonargparse 4.53
    options = ("accelerator=cpu", "logger=false", f"max_epochs={EPOCHS}")
    for block in blocks(page, "yaml"):
        (tmp_path / "page.yaml").write_text(block, encoding="utf-8")
        cli = LightningCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=["fit", "--config", "page.yaml", *(f"--trainer.{option}" for option in options)],
        )
        callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
        (found,) = (c for c in callbacks if isinstance(c, HessianSpectrumCallback))
        assert [record.error for record in found.history] == [None] * EPOCHS
        assert found.history[-1].layers
        assert found.checkpoint.best_model_path


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash")], ids=lambda page: page.stem)
def test_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    cli_project.run(tmp_path / "runs", epochs=1)
    (tmp_path / "runs" / "epoch=0.ckpt").rename(tmp_path / "runs" / "last.ckpt")
    shutil.copytree(tmp_path / "runs", tmp_path / "lightning_logs" / "version_0")
    for line in "".join(blocks(page, "bash")).splitlines():
        command, *arguments = shlex.split(line)
        if command == "lightning-hesd":
            main([*arguments, "--accelerator=cpu"] if arguments[0] in {"analyze", "sample-size"} else arguments)
        else:  # other programs, not ours to test
            assert command in {"pip", "tensorboard"}, line


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_files_it_names_exist_and_its_code_is_in_languages_that_are_tested(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if "://" not in link:
            assert (page.parent / link.partition("#")[0]).resolve().is_file(), link
    assert set(re.findall(r"```(\w+)\n", text)) <= {"python", "bash", "yaml", "text"}
