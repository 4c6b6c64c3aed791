"""Follow the layers of a small transformer, written in the style of Hugging Face, as it learns to spell.

The model is made from a config. Its forward takes `input_ids` and `labels` as keywords and returns an object with
`.loss` and `.logits`. It is in an ordinary LightningModule, which gives the callback its loss. With `layers="auto"`
every attention, MLP, norm and embedding is a block. The head shares the weights of the token embedding, so both are one
block.

The text is scikit-learn's description of its data sets.

    python -m examples.transformer
    python -m examples.transformer --epochs 20 --layers 4
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from examples.shared import quiet
from lightning_hesd import HessianSpectrumCallback
from lightning_hesd.spectra.indicators import layer_indicators

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_hesd.training.history import SpectrumRecord


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the model."""

    vocab_size: int
    context: int = 32
    hidden_size: int = 48
    num_layers: int = 2
    num_heads: int = 4


@dataclass(frozen=True)
class CausalLMOutput:
    """Output of the model."""

    logits: Tensor
    loss: Tensor | None = None


class SelfAttention(nn.Module):
    """Causal attention: each character attends to itself and to earlier ones."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        q, k, v = self.qkv(hidden).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


class MLP(nn.Sequential):
    """Two linear layers; with `layers="auto"`, the class name makes them one block."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class Layer(nn.Module):
    """Attention and MLP, both residual, with norms before them."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.attention = SelfAttention(config)
        self.mlp = MLP(config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        result: Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        return result


class TinyForCausalLM(nn.Module):
    """A decoder that predicts the next character."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.context, config.hidden_size)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        hidden = self.tokens(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(self.norm(hidden))
        if labels is None:
            return CausalLMOutput(logits)
        return CausalLMOutput(logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


class Characters(Dataset[dict[str, Tensor]]):
    """Chunks of a text, as `input_ids` and `labels`."""

    def __init__(self, length: int) -> None:
        sets = (load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine)
        text = "".join(load().DESCR.lower() for load in sets)
        self.alphabet = sorted(set(text))
        ids = torch.tensor([self.alphabet.index(character) for character in text])
        self.pieces = ids.unfold(0, length, length)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


class LanguageModel(pl.LightningModule):
    """The usual wrapper: passes a batch by its keys, and returns the loss of the model's output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def report(record: SpectrumRecord) -> None:
    """Print a row for each layer of a record."""
    assert record.layers is not None
    print(f"\nepoch {record.epoch}\n{'block':30}  parameters      C_t    λ_max     trace  effective rank")
    for name, indicators in layer_indicators(record.layers).items():
        spectrum = record.layers[name]
        print(
            f"{name:30}  {spectrum.dimension:10}  {spectrum.c_t:7.4f}  {spectrum.lambda_max:7.3f}  "
            f"{spectrum.trace:8.2f}  {indicators.effective_rank:14.1f}"
        )


def main(args: Sequence[str] | None = None) -> HessianSpectrumCallback:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="Lanczos steps")
    parser.add_argument("--samples", type=int, default=64, help="pieces of text to analyze")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", type=Path, default=Path("runs/transformer"))
    options = parser.parse_args(args)
    torch.set_num_threads(1)  # more threads do not speed up so small a network, and slow it down on shared cores

    with quiet():
        pl.seed_everything(options.seed, verbose=False)
        text = Characters(length=32)
        model = TinyForCausalLM(TinyConfig(len(text.alphabet), num_layers=options.layers))
        spectra = HessianSpectrumCallback(
            epochs=sorted({0, options.epochs // 2, options.epochs - 1}),
            layers="auto",
            num_samples=options.samples,
            batch_size=options.samples,
            steps=options.steps,
        )
        trainer = pl.Trainer(
            max_epochs=options.epochs,
            accelerator="cpu",
            logger=TensorBoardLogger(options.log_dir, name=None),
            callbacks=[spectra],
            log_every_n_steps=10,
            enable_model_summary=False,
        )
        trainer.fit(LanguageModel(model), DataLoader(text, batch_size=32, shuffle=True))
    for record in spectra.history:
        print(f"epoch {record.epoch:2}: {record.spectrum or record.error}")
    report(spectra.history[-1])
    print(f"\nHeat maps of the layers over epochs: tensorboard --logdir {options.log_dir}")
    return spectra


if __name__ == "__main__":
    main()
