"""Language models in the style of Hugging Face: dicts in and out, tokens, checkpointed layers, adapters."""

from collections import OrderedDict, UserDict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from examples.transformer import TinyConfig, TinyForCausalLM
from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback, Spectrum
from lightning_hesd.commands.cli import main
from tests.oracles import dense_hessian
from tests.training.modules import freeze
from tests.training.scripted import make_trainer

IGNORED = -100
VOCABULARY = 7
SAMPLES = 12


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, VOCABULARY, (2 + i * 5 % 7,), generator=generator) for i in range(SAMPLES)]


class Batch(UserDict):  # type: ignore[type-arg]
    """As tokenizers make them."""


class Output(OrderedDict):  # type: ignore[type-arg]
    """As models return it: items are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def collate(rows: list[Tensor]) -> Batch:
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return Batch(input_ids=ids, attention_mask=mask, labels=ids.where(mask == 1, IGNORED))


class Adapter(nn.Module):
    """W x + B A dropout(x), of which only A and B are trained."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.a = nn.Linear(base.in_features, 1, bias=False)
        self.b = nn.Linear(1, base.out_features, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Any:
        return self.base(x) + self.b(self.a(self.dropout(x)))


class Checkpointed(nn.Module):
    """A layer whose activations are computed again in the backward pass, in training mode only."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Any:
        return checkpoint(self.layer, hidden, use_reentrant=True) if self.training else self.layer(hidden)


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = TinyForCausalLM(TinyConfig(VOCABULARY, context=8, hidden_size=4, num_layers=1, num_heads=2))
        self.model.requires_grad_(requires_grad=False)
        for layer in self.model.layers:
            layer.attention.qkv, layer.mlp[0] = Adapter(layer.attention.qkv), Adapter(layer.mlp[0])
        self.model.layers = nn.ModuleList(Checkpointed(layer) for layer in self.model.layers)
        # Without it, a reentrant region has no gradient, if what goes in has none.
        self.model.tokens.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())

    def training_step(self, batch: Batch, batch_idx: int) -> Output:
        found = self.model(batch["input_ids"], batch["labels"])
        return Output(loss=found.loss, logits=found.logits.detach())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(sequences(), batch_size=5, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]


def tokens(batch: Batch) -> float:
    return float((batch["labels"][:, 1:] != IGNORED).sum())


def fit(folder: Path, *callbacks: pl.Callback) -> pl.Trainer:
    torch.manual_seed(0)
    trainer = make_trainer(folder, list(callbacks), 2, precision="64-true")
    trainer.fit(Net(), datamodule=Data())
    return trainer


def loss_of_sequence(module: Net, batch: tuple[Tensor]) -> Tensor:
    return module.model(batch[0][None], batch[0][None]).loss


def test_curvature_of_the_mean_over_all_tokens(tmp_path: Path) -> None:
    callback = HessianSpectrumCallback(every_n_epochs=2, batch_weight="tokens", sampling_error=True, steps=100)
    module = fit(tmp_path / "with", callback).lightning_module
    plain = fit(tmp_path / "without").lightning_module
    assert freeze(module.state_dict()) == freeze(plain.state_dict())
    [record] = callback.history
    assert record.error is None
    spectrum = record.spectrum
    assert (spectrum.strategy, spectrum.num_samples, spectrum.sampling_groups) == ("graph", SAMPLES, SAMPLES)
    rows, tokens_in = [(row,) for row in sequences()], [len(row) - 1.0 for row in sequences()]
    expected = torch.linalg.eigvalsh(dense_hessian(module, rows, loss_of_sequence, weights=tokens_in))
    assert spectrum.dimension == len(expected) == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert spectrum.lambda_max == pytest.approx(float(expected[-1]), rel=1e-8)
    assert spectrum.lambda_min == pytest.approx(float(expected[0]), rel=1e-8)


def test_on_the_command_line(tmp_path: Path) -> None:
    rule = HessianCheckpoint("highest_c_t", require_mp=False)
    callback = HessianSpectrumCallback(every_n_epochs=2, batch_weight="tokens", steps=20, checkpoint=rule)
    fit(tmp_path, callback)
    [record] = callback.history
    project = ["--model", f"{__name__}.Net", "--data", f"{__name__}.Data", "--accelerator=cpu", "--analysis.steps=20"]
    for number, weight in enumerate(["tokens", f"{__name__}.tokens"]):
        out = tmp_path / str(number)
        weighted = [f"--analysis.batch_weight={weight}", f"--out={out}"]
        main(["analyze", callback.checkpoint.best_model_path, *project, *weighted])
        [found] = map(Spectrum.load, (out / "spectra").glob("*.npz"))
        assert found.num_samples == SAMPLES
        # In single precision, which the command takes.
        assert found.loss == pytest.approx(record.spectrum.loss, rel=1e-6)
        assert found.lambda_max == pytest.approx(record.spectrum.lambda_max, rel=1e-4)
