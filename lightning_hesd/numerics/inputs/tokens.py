"""The number of tokens of a batch: labels that are not ignored, or nonzero values of the attention mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lightning_hesd.numerics.inputs.cuts import attributes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

IGNORED = -100
"""The label that PyTorch and Hugging Face's models ignore."""

Source = Literal["labels", "attention_mask"]


@dataclass(frozen=True)
class TokenCount:
    """A rule for counting the tokens of a batch.

    Attributes:
        source: The entry of the batch that shows which tokens count.
        shifted: Whether the first token of each row does not count.
    """

    source: Source
    shifted: bool

    def __call__(self, batch: Any) -> float:
        """Return the number of tokens."""
        return float(self.per_sample(batch).sum())

    def per_sample(self, batch: Any) -> Tensor:
        """Return the number of tokens in each row, shape (rows,), on the CPU.

        Raises:
            ValueError: If the batch does not have the entry.
        """
        found = find(batch, self.source)
        if found is None:
            msg = (
                f"`batch_weight` counts tokens by `{self.source}`, which a batch of type {type(batch).__name__} lacks."
            )
            raise ValueError(msg)
        counted = found.values != (IGNORED if self.source == "labels" else 0)
        if self.shifted and counted.ndim > 1:
            counted = counted[..., 1:]
        return counted.reshape(len(counted), -1).sum(1).cpu()

    def __str__(self) -> str:
        """Return the rule in words."""
        counted = f"`labels` other than {IGNORED}" if self.source == "labels" else "nonzero values of `attention_mask`"
        return f"{counted} after the first of each row" if self.shifted else counted

    def advice(self) -> str:
        """Return the argument `batch_weight` that counts by this rule."""
        part = "[:, 1:]" if self.shifted else ""
        entry = f'batch["{self.source}"]{part}'
        return f"batch_weight=lambda batch: {f'({entry} != {IGNORED})' if self.source == 'labels' else entry}.sum()"


ADVICE = TokenCount("labels", shifted=True).advice()
"""The rule for models that predict the next token."""


@dataclass(frozen=True)
class Entry:
    """The labels or the attention mask of a batch.

    Attributes:
        holder: The mapping or object with the entry.
        name: Name of the entry.
        values: Labels, or an attention mask.
    """

    holder: Any
    name: Source
    values: Tensor

    def replace(self, values: Tensor) -> None:
        """Replace the values in the holder."""
        if isinstance(self.holder, Mapping):
            self.holder[self.name] = values  # type: ignore[index]  # or it raises
        else:
            setattr(self.holder, self.name, values)


def find(batch: Any, name: Source) -> Entry | None:
    """Return the entry of this name at any depth of a batch; None if there is none, or more than one."""
    try:
        found = list(_entries(batch, name))
    except Exception:  # noqa: BLE001 - objects that cannot be read by their own methods
        return None
    if len(found) != 1 or found[0].values.ndim == 0:
        return None
    return None if name == "labels" and found[0].values.is_floating_point() else found[0]


def _entries(part: Any, name: Source, depth: int = 4) -> Iterator[Entry]:
    if isinstance(part, Tensor) or depth == 0:
        return
    inner: Sequence[Any] = part if isinstance(part, list | tuple) else ()
    if not isinstance(part, list | tuple):
        known = part if isinstance(part, Mapping) else attributes(part)
        if isinstance(known.get(name), Tensor):
            yield Entry(part, name, known[name])
        inner = list(known.values())
    for value in inner:
        if isinstance(value, Mapping | list | tuple):
            yield from _entries(value, name, depth - 1)
