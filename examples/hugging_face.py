"""Fine-tune a small GPT-2 with LoRA, and follow the curvature of the adapters.

A model of Hugging Face's transformers learns Python's help (`pydoc_data.topics`, which comes with Python), character by
character, except for one topic. Then adapters of PEFT learn that topic, with gradient checkpointing as for large
models. The callback analyzes the trained weights, which are the adapters. Rows are padded to the longest, so the loss
of a batch is a mean over its tokens. With `batch_weight="tokens"` the Hessian is that of the mean over all tokens of
the sample.

    pip install transformers peft
    python -m examples.hugging_face
    python -m examples.hugging_face --topic types --rank 8 --figure types.png
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.shared import quiet
from lightning_hesd import HessianCheckpoint, HessianSpectrumCallback
from lightning_hesd.plotting import plot_c_t, plot_density_evolution

if TYPE_CHECKING:
    from collections.abc import Sequence

CONTEXT = 96
ALPHABET = sorted(set("".join(topics.values())))
IDS = {character: number for number, character in enumerate(ALPHABET)}
IGNORED = -100
"""The label of padding; it does not count in the loss."""


def encoded(text: str) -> Tensor:
    """Return the numbers of the characters."""
    return torch.tensor([IDS[character] for character in text])


def paragraphs(topic: str) -> list[Tensor]:
    """Return the paragraphs of a topic, cut to the length of the context."""
    parts = [" ".join(part.split()) for part in topics[topic].split("\n\n")]
    return [encoded(part[:CONTEXT]) for part in parts if len(part) >= CONTEXT // 8]


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    """Return a batch in the format of transformers, padded to its longest row."""
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def loader(rows: Sequence[Tensor], *, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(rows, batch_size=32, shuffle=shuffle, collate_fn=collate)  # type: ignore[arg-type]


class CausalLM(pl.LightningModule):
    """The usual wrapper: passes a batch by its keys, and returns the loss of the model."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.model = model
        self.lr = lr
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
        self.log("val_loss", self.model(**batch).loss, prog_bar=True, batch_size=tokens)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.losses.append(float(self.trainer.callback_metrics["val_loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.lr)


def pretrained(topic: str, steps: int) -> nn.Module:
    """Return a GPT-2 trained on all topics except one."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 - not a dependency of this project

    size = {"n_positions": CONTEXT, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model: nn.Module = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(ALPHABET), bos_token_id=None, eos_token_id=None, **size)
    )
    text = encoded("\n".join(text for name, text in topics.items() if name != topic))
    plain = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "limit_val_batches": 0}
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", **plain)  # type: ignore[arg-type]
    trainer.fit(CausalLM(model, lr=3e-3), loader(list(text.unfold(0, CONTEXT, CONTEXT)), shuffle=True))
    return model


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """Return the model with adapters of this rank and all other weights frozen."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - not a dependency of this project

    model.gradient_checkpointing_enable()  # type: ignore[operator]
    adapters = LoraConfig(r=rank, target_modules=["c_attn", "c_fc"], lora_dropout=0.05, fan_in_fan_out=True)
    adapted: nn.Module = get_peft_model(model, adapters)
    return adapted


def main(args: Sequence[str] | None = None) -> tuple[CausalLM, HessianSpectrumCallback, HessianCheckpoint]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topic", default="debugger", choices=sorted(topics), help="topic of the adapters")
    parser.add_argument("--pretraining", type=int, default=600, help="steps before")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rank", type=int, default=4, help="rank of the adapters")
    parser.add_argument("--steps", type=int, default=25, help="Lanczos steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-dir", type=Path, default=Path("runs/hugging_face"))
    parser.add_argument("--figure", type=Path, default=Path("hugging_face.png"))
    options = parser.parse_args(args)

    rows = paragraphs(options.topic)
    random.Random(options.seed).shuffle(rows)
    held_out, training = rows[: len(rows) // 4], rows[len(rows) // 4 :]
    rule = HessianCheckpoint("highest_c_t")
    spectra = HessianSpectrumCallback(
        every_n_epochs=2, at_start=True, batch_weight="tokens", steps=options.steps, num_samples=64, checkpoint=rule
    )
    with quiet():
        pl.seed_everything(options.seed, verbose=False)
        module = CausalLM(with_adapters(pretrained(options.topic, options.pretraining), options.rank), lr=1e-2)
        trainer = pl.Trainer(
            max_epochs=options.epochs,
            accelerator="cpu",
            logger=TensorBoardLogger(options.log_dir, name=None),
            callbacks=[spectra],
            enable_model_summary=False,
        )
        before = trainer.validate(module, loader(held_out), verbose=False)[0]["val_loss"]
        trainer.fit(module, loader(training, shuffle=True), loader(held_out))
        picked = trainer.validate(module, loader(held_out), ckpt_path=rule.best_model_path, verbose=False)

    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    print(f"{trained} of {sum(p.numel() for p in module.parameters())} parameters are trained and analyzed.")
    print("epoch  loss on training  on held-out text      C_t    λ_max  type")
    for record in spectra.history:
        found, held = record.spectrum, before if record.epoch < 0 else module.losses[record.epoch + 1]
        mark = "  picked" if rule.best is not None and rule.best.epoch == record.epoch else ""
        curvature = record.error if found is None else f"{found.c_t:7.4f}  {found.lambda_max:7.3f}  {found.hesd_type}"
        loss = float("nan") if found is None else found.loss
        print(f"{record.epoch:5}  {loss:16.4f}  {held:16.4f}  {curvature}{mark}")
    print(f"The pick has a loss of {picked[0]['val_loss']:.4f} on held-out text.")
    draw(spectra, options.figure)
    return module, spectra, rule


def draw(spectra: HessianSpectrumCallback, path: Path) -> None:
    """Draw C_t and the density over the epochs."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes long to load

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_c_t(spectra.history, ax=left)
    plot_density_evolution(spectra.history, ax=right)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
