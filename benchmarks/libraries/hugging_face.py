"""Hugging Face Transformers and PEFT: language models and others, in a custom LightningModule."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from benchmarks.libraries.case import Case, Library
from benchmarks.libraries.trial import seed_everything

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}


class HuggingFaceModule(pl.LightningModule):
    """Trains a model that returns its loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of a batch."""
        loss: Tensor = self.model(**batch).loss
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW with warm-up."""
        from transformers import get_linear_schedule_with_warmup

        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)
        schedule = get_linear_schedule_with_warmup(optimizer, 2, 100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def tokens() -> Tensor:
    """Return 256 sequences of 16 tokens."""
    return torch.randint(3, 64, (256, 16), generator=torch.Generator().manual_seed(0))


def text() -> DataLoader[Any]:
    """Return a loader of sequences for next-token prediction."""
    mask = torch.ones(16, dtype=torch.long)
    items: Any = [{"input_ids": row, "attention_mask": mask, "labels": row} for row in tokens()]
    return DataLoader(items, 32, shuffle=True)


def padded_text() -> DataLoader[Any]:
    """Return a loader of sequences of different lengths, in two classes, as `BatchEncoding`s."""
    from transformers import BatchEncoding

    items: Any = [(row[: 8 + i % 9], int(row.float().mean() > 32)) for i, row in enumerate(tokens())]

    def collate(chosen: Sequence[tuple[Tensor, int]]) -> Any:
        rows = [row for row, _ in chosen]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        labels = torch.tensor([label for _, label in chosen])
        return BatchEncoding({"input_ids": padded, "attention_mask": mask, "labels": labels})

    return DataLoader(items, 32, shuffle=True, collate_fn=collate)


def images() -> DataLoader[Any]:
    """Return a loader of images in three classes."""
    pixels = torch.randn(128, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    items: Any = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(pixels)]
    return DataLoader(items, 32, shuffle=True)


def made(model: str, config: str, **options: Any) -> Any:
    """Return a model of transformers with random weights."""
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**options))


def adapted(base: Any, *, checkpointing: bool = False, **options: Any) -> Any:
    """Return a model with PEFT's LoRA.

    Args:
        base: Makes the model.
        checkpointing: Whether its activations are recomputed in the backward pass.
        **options: Options of LoRA.
    """
    from peft import LoraConfig, get_peft_model

    model = base()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return get_peft_model(model, LoraConfig(r=2, **options))


def train(make: Any, data: Any, callbacks: list[Any], folder: Path) -> Any:
    """Train a model.

    Args:
        make: Makes it.
        data: Makes the loader.
        callbacks: Callbacks of the Trainer.
        folder: Output folder.
    """
    seed_everything()
    module = HuggingFaceModule(make())
    trainer = pl.Trainer(
        max_epochs=2, callbacks=callbacks, enable_progress_bar=False, accelerator="cpu", default_root_dir=folder
    )
    trainer.fit(module, data())
    return module


BERT = partial(made, "BertForSequenceClassification", "BertConfig", **SMALL)
LLAMA = partial(made, "LlamaForCausalLM", "LlamaConfig", **SMALL, num_key_value_heads=1)
GPT2 = partial(made, "GPT2LMHeadModel", "GPT2Config", vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
MIXTRAL = partial(made, "MixtralForCausalLM", "MixtralConfig", **SMALL, num_key_value_heads=1, num_local_experts=2)
VIT = partial(
    made,
    "ViTForImageClassification",
    "ViTConfig",
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=16,
    patch_size=4,
    num_labels=3,
)

LIBRARY = Library(
    name="transformers",
    kind="language models",
    requirements=("transformers==5.24", "peft==0.21.2"),
    shown=("peft",),
    cases=(
        Case("GPT2LMHeadModel", partial(train, GPT2, text)),
        Case("LlamaForCausalLM", partial(train, LLAMA, text)),
        Case("MixtralForCausalLM", partial(train, MIXTRAL, text)),
        Case("BertForSequenceClassification", partial(train, BERT, padded_text)),
        Case("ViTForImageClassification", partial(train, VIT, images)),
        Case(
            "Llama with PEFT's LoRA",
            partial(train, partial(adapted, LLAMA, target_modules=["q_proj", "v_proj"], lora_dropout=0.1), text),
        ),
        Case(
            "BERT with PEFT's LoRA, gradient checkpointing",
            partial(
                train,
                partial(adapted, BERT, checkpointing=True, task_type="SEQ_CLS", target_modules=["query", "value"]),
                padded_text,
            ),
        ),
    ),
)
