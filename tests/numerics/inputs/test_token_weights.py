"""Batches weighed by their tokens, against Hessians known in closed form."""

import warnings
from collections import UserDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hesd import hessian_spectrum
from lightning_hesd.numerics.collectives import LOCAL, Collectives
from lightning_hesd.numerics.inputs.batches import WeightedBatch
from lightning_hesd.numerics.inputs.token_weights import Weighing
from lightning_hesd.numerics.inputs.tokens import TokenCount
from tests.ranks import in_threads

VOCABULARY = 5
LENGTHS = ((7, 2, 3, 1), (3, 4), (9, 2, 2, 2, 8))
IGNORED = -100


class Table(nn.Module):
    """Logits of the next token, or of a label at the same place, that depend on one token only."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(3)))
        self.causal = causal
        self.double()

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Any = None) -> dict[str, Tensor]:
        logits = self.weight[input_ids]
        if self.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@dataclass
class Record:
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def padded(lengths: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(VOCABULARY, shape, generator=generator)
    # As a tokenizer and a collator leave them: rows are padded on the right, and the padding has no label.
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.where(mask == 1, IGNORED)}


BATCHES = [padded(lengths, seed) for seed, lengths in enumerate(LENGTHS)]


def with_labels(module: Table, batch: Any) -> Tensor:
    data = vars(batch) if isinstance(batch, Record) else batch[0] if isinstance(batch, list) else batch
    return module(**data)["loss"]


def from_mask(module: Table, batch: Any) -> Tensor:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return module(ids, ids.masked_fill(mask == 0, IGNORED))["loss"]


def closed_form(module: Table, batches: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Return loss and largest eigenvalue: row i of the table has the Hessian n_i/N (diag(p_i) - p_i p_iᵀ)."""
    pairs = []
    for batch in batches:
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            inputs, outputs = (ids[:-1], labels[1:]) if module.causal else (ids, labels)
            pairs += [pair for pair in zip(inputs, outputs, strict=True) if pair[1] != IGNORED]
    p = module.weight.detach().softmax(1)
    loss = -sum(p[i, j].log().item() for i, j in pairs) / len(pairs)
    top = 0.0
    for i in range(VOCABULARY):
        share = sum(pair[0] == i for pair in pairs) / len(pairs)
        top = max(top, share * torch.linalg.eigvalsh(p[i].diag() - p[i].outer(p[i]))[-1].item())
    return loss, top


FORMS = {
    "dict": lambda batch: batch,
    "UserDict": UserDict,
    "record": lambda batch: Record(**batch),
    "in a list": lambda batch: [batch],
    "mask": lambda batch: {name: batch[name] for name in ("input_ids", "attention_mask")},
}


def check(spectrum: Any, module: Table, batches: list[dict[str, Tensor]] = BATCHES) -> None:
    loss, top = closed_form(module, batches)
    assert spectrum.loss == pytest.approx(loss, rel=1e-12)
    assert spectrum.lambda_max == pytest.approx(top, rel=1e-10)
    assert spectrum.num_samples == sum(len(batch["labels"]) for batch in batches)


class TestTokens:
    @pytest.mark.parametrize(("form", "causal"), [*((form, True) for form in FORMS), ("dict", False), ("mask", False)])
    def test_of_all_batches_count_alike(self, causal, form):
        module, loss = Table(causal=causal), from_mask if form == "mask" else with_labels
        spectrum = hessian_spectrum(module, [FORMS[form](b) for b in BATCHES], loss, steps=25, batch_weight="tokens")
        check(spectrum, module)

    @pytest.mark.parametrize("form", ["UserDict", "mask"])
    def test_are_found_out(self, form):
        module, loss = Table(causal=True), from_mask if form == "mask" else with_labels
        with pytest.warns(RuntimeWarning, match=r"is a mean over tokens.*Pass `batch_weight=\"tokens\"`") as caught:
            spectrum = hessian_spectrum(module, [FORMS[form](batch) for batch in BATCHES], loss, steps=25)
        assert len(caught) == 1
        check(spectrum, module)

    @pytest.mark.parametrize("causal", [True, False])
    def test_without_padding(self, causal):
        batches = [padded(lengths, seed) for seed, lengths in enumerate([(3, 3), (9,), (5, 5, 5)])]
        shared = [{"input_ids": batch["input_ids"], "labels": batch["input_ids"]} for batch in batches]
        module = Table(causal=causal)
        check(hessian_spectrum(module, shared, with_labels, steps=25, batch_weight="tokens"), module, batches)

    def test_batches_without_any_are_left_out(self):
        module, nothing = Table(causal=True), {**BATCHES[0], "labels": torch.full_like(BATCHES[0]["labels"], IGNORED)}
        batches = [nothing, *BATCHES]
        assert with_labels(module, nothing).isnan()
        spectrum = hessian_spectrum(module, batches, with_labels, steps=25, batch_weight="tokens")
        assert spectrum.loss == pytest.approx(closed_form(module, BATCHES)[0], rel=1e-12)
        with pytest.raises(ValueError, match="no batch has a token: there are no `labels` other than -100"):
            hessian_spectrum(module, [nothing], with_labels, batch_weight="tokens")

    def test_of_groups_of_samples(self):
        module, batch = Table(causal=True), padded(tuple(2 + i * 5 % 11 for i in range(16)), 5)
        whole = hessian_spectrum(module, [batch], with_labels, steps=25, batch_weight="tokens", sampling_error=True)
        rows = [{name: values[i : i + 1] for name, values in batch.items()} for i in range(16)]
        weights = {"steps": 25, "batch_weight": lambda row: float((row["labels"][:, 1:] != IGNORED).sum())}
        apart = hessian_spectrum(module, rows, with_labels, sampling_error=True, **weights)
        assert whole.sampling_groups == apart.sampling_groups == 16
        assert whole.lambda_max_sampling_error == pytest.approx(apart.lambda_max_sampling_error, rel=1e-8)
        own = hessian_spectrum(module, [batch], with_labels, sampling_error=True, **weights)
        assert own.lambda_max_sampling_error == pytest.approx(apart.lambda_max_sampling_error, rel=1e-8)

    @pytest.mark.parametrize(
        ("batches", "loss", "message"),
        [
            ([(b["input_ids"], b["labels"]) for b in BATCHES], None, r"needs batches that all have.*\[:, 1:\] != -100"),
            ([*BATCHES, {"input_ids": torch.ones(2, 3)}], None, "needs batches that all have"),
            (
                [dict.fromkeys(["attention_mask", "input_ids"], torch.ones(2, length).long()) for length in (3, 5)],
                from_mask,
                r"cannot be told.*`batch_weight=lambda batch: batch\[\"attention_mask\"\]\[:, 1:\].sum\(\)`",
            ),
            (
                [FORMS["mask"](b) for b in BATCHES],
                lambda m, b: from_mask(m, b) + len(b["input_ids"]),
                "neither by samples nor by tokens",
            ),
        ],
    )
    def test_that_cannot_be_counted(self, batches, loss, message):
        with pytest.raises(ValueError, match=message):
            hessian_spectrum(Table(causal=True), batches, loss or with_labels, batch_weight="tokens")

    def test_of_a_loss_that_is_no_mean_over_them(self):
        def with_another_label(module: Table, batch: Any) -> Tensor:
            return with_labels(module, {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == 2, IGNORED)})

        with pytest.warns(RuntimeWarning, match="is not the mean over these"):
            hessian_spectrum(Table(causal=True), BATCHES, with_another_label, steps=5, batch_weight="tokens")


def mean_over_samples(module: Table, batch: Any) -> Tensor:
    rows = [{name: values[i : i + 1] for name, values in batch.items()} for i in range(len(batch["labels"]))]
    return torch.stack([with_labels(module, row) for row in rows]).mean()


def squared_mean(module: Table, batch: Any) -> Tensor:
    return with_labels(module, batch) ** 2


class TestSamples:
    """What is no mean over tokens is weighed by samples, as ever."""

    BATCHES = ({name: values[:2] for name, values in BATCHES[0].items()}, BATCHES[1])

    def test_mean_over_samples(self):
        spectrum = hessian_spectrum(Table(causal=True), self.BATCHES, mean_over_samples, steps=5)
        losses = [mean_over_samples(Table(causal=True), batch).item() for batch in self.BATCHES]
        assert spectrum.loss == pytest.approx(sum(losses) / 2, rel=1e-12)

    @pytest.mark.parametrize(
        ("loss", "obstacle"),
        [
            (squared_mean, "neither by samples nor by tokens"),
            (lambda m, b: squared_mean(m, b) / (torch.tensor(len(b["labels"])) // 2), "neither by samples nor by"),
            (lambda m, b: squared_mean(m, b) * (1 // (len(b["labels"]) // 2)), "ZeroDivisionError"),
        ],
    )
    def test_it_is_said_where_that_is_a_guess(self, loss, obstacle):
        with pytest.warns(RuntimeWarning, match=f'cannot be told whether.*{obstacle}.*`batch_weight="tokens"`'):
            spectrum = hessian_spectrum(Table(causal=True), self.BATCHES, loss, steps=5)
        losses = [loss(Table(causal=True), batch).item() for batch in self.BATCHES]
        assert spectrum.loss == pytest.approx(sum(losses) / 2, rel=1e-12)

    def test_classes_take_no_evaluation(self):
        calls = []
        mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]])

        def loss(module: nn.Linear, batch: Any) -> Tensor:
            calls.append(len(batch["labels"]))
            return F.cross_entropy(module(batch["x"]), batch["labels"])

        batch = {"x": torch.randn(4, 3), "labels": torch.arange(4) % 2}
        hessian_spectrum(nn.Linear(3, 2), [{**batch, "attention_mask": mask}] * 2, loss, steps=2)
        with_mask, calls[:] = list(calls), []
        hessian_spectrum(nn.Linear(3, 2), [batch] * 2, loss, steps=2)
        assert calls == with_mask


class TestWeighing:
    """What an analysis finds out, provisionally and on several ranks."""

    @staticmethod
    def weighing(batches: Any, module: Any = None, *, wanted: Any = None, collectives: Any = LOCAL) -> Weighing:
        weighted = [WeightedBatch(batch, float(len(batch["labels"])), i) for i, batch in batches]
        module = module or Table(causal=True)
        return Weighing(wanted, weighted, lambda batch: with_labels(module, batch.data), collectives)

    def test_where_all_tokens_have_one_loss_it_is_decided_later(self):
        module = Table(causal=True)
        nn.init.zeros_(module.weight)
        weighing = self.weighing(list(enumerate(BATCHES)), module)
        assert weighing.decide() is None
        assert not weighing.is_settled
        classes = self.weighing([(0, {"labels": torch.arange(3)})])
        assert classes.decide() is None
        assert classes.is_settled

    @pytest.mark.parametrize("wanted", ["tokens", None])
    def test_ranks_agree(self, wanted):
        # One of them has a batch that tells nothing, one has none.
        shares = [[(0, BATCHES[0]), (3, BATCHES[2])], [(1, {n: v[1:] for n, v in BATCHES[1].items()})], []]

        def work(ranks: Collectives) -> Any:
            weighing = self.weighing(shares[ranks.rank], wanted=wanted, collectives=ranks)
            count = weighing.decide()
            return count, [batch.weight for batch in weighing.apply(count)]

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = in_threads(3, work)
        count = TokenCount("labels", shifted=True)
        assert found == [(count, [9.0, 18.0]), (count, [3.0]), (count, [])]
        assert len(caught) == (wanted is None)
