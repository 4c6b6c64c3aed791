"""Records as plain values and back; errors of the program are no damage of files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hesd import HessianSpectrumCallback, Spectrum, SpectrumHistory
from lightning_hesd.commands.results import Results
from lightning_hesd.spectra import codec, payload, payload_reading, spectrum_data
from lightning_hesd.spectra.codec import Packing, load_layers, pack_records, save, unpack_records
from lightning_hesd.spectra.record import SpectrumRecord
from lightning_hesd.spectra.spectrum_data import OPTIONAL, REQUIRED, STORED_ARRAYS
from lightning_hesd.spectra.validation import parsed
from tests.states import history_of
from tests.training.scripted import make_spectrum

words = st.text(st.characters(codec="utf-8"), max_size=4)
sizes = st.floats(1e-300, 1e100)
undefined = st.one_of(st.none(), st.floats(allow_nan=True))


@st.composite
def spectra(draw: st.DrawFn, dimension: int = 50) -> Spectrum:
    """Any spectrum: several probes of any length, fields of any value."""
    steps = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    nodes = np.full((len(steps), max(steps)), np.nan)
    weights, residuals = np.zeros_like(nodes), np.zeros_like(nodes)
    for row, count in enumerate(steps):
        nodes[row, :count] = sorted(draw(st.lists(st.floats(-1e100, 1e100), min_size=count, max_size=count)))
        weights[row, :count] = 1 / count
        residuals[row, :count] = draw(st.lists(sizes, min_size=count, max_size=count))
    return Spectrum(
        nodes=nodes,
        weights=weights,
        residuals=residuals,
        steps_per_probe=tuple(steps),
        dimension=dimension,
        num_samples=draw(st.integers(0, 2**40)),
        loss=draw(st.floats()),
        rounding=draw(sizes),
        matvecs=draw(st.integers(0, 2**40)),
        seconds=draw(sizes),
        gradient_equivalents=draw(undefined),
        asymmetry=draw(undefined),
        c_t_sampling_error=draw(undefined),
        reason=draw(st.one_of(st.none(), words)),
        tolerance=draw(st.sampled_from([None, "type", "auto", 0.25])),
        verified=draw(st.sampled_from(["yes", "no", "unknown"])),
        sampling_groups=draw(st.one_of(st.none(), st.integers(0, 99))),
    )


records = st.builds(
    SpectrumRecord,
    epoch=st.integers(-1, 10**6),
    global_step=st.integers(0, 10**9),
    spectrum=st.one_of(st.none(), spectra()),
    error=st.one_of(st.none(), words),
    generalization=st.one_of(st.none(), spectra()),
    layers=st.one_of(st.none(), st.dictionaries(words, spectra(), max_size=2)),
    stability_threshold=st.one_of(st.none(), st.floats(allow_nan=False)),
    first_loss=st.one_of(st.none(), st.floats(allow_nan=False)),
    metrics=st.dictionaries(words, st.floats(allow_nan=False, allow_infinity=False), max_size=2),
    gradients=st.dictionaries(words, st.floats(allow_nan=False, allow_infinity=False), max_size=2),
)


def values(content: Any) -> Any:
    """All fields as text, in which NaN equals itself."""
    if isinstance(content, Spectrum):
        return {name: str(getattr(v, "tolist", lambda v=v: v)()) for name, v in content.to_dict().items()}
    if isinstance(content, dict):
        return {name: values(one) for name, one in content.items()}
    return str(content)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(records, max_size=3))
def test_packed_records_come_back(history: list[SpectrumRecord]) -> None:
    rows, packing = pack_records(history)
    text = json.dumps(rows)
    again = unpack_records(parsed(text, finite=False), Packing.of(packing.numbers, packing.shapes))
    assert len(again) == len(history)
    for ours, theirs in zip(again, history, strict=True):
        for field in vars(theirs):
            expected = None if field == "layers" and not theirs.layers else getattr(theirs, field)
            assert values(getattr(ours, field)) == values(expected), field


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.dictionaries(words, spectra(), min_size=1, max_size=2))
def test_layers_in_a_file_come_back(tmp_path_factory: pytest.TempPathFactory, layers: dict[str, Spectrum]) -> None:
    path = tmp_path_factory.getbasetemp() / "layers.npz"
    save(layers, path)
    assert values(load_layers(path)) == values(layers)


def test_every_field_of_a_spectrum_has_a_check() -> None:
    assert {*REQUIRED, *OPTIONAL} == set(make_spectrum(-0.2).to_dict())


@pytest.mark.parametrize(
    ("numbers", "shapes"),
    [([1.0], []), ([1.0], [[2]]), ([1.0], [[2**63]]), ([], [[2**40, 2**40]]), ([[1.0]], [[1]]), ([1.0], [[1], [1]])],
)
def test_a_packing_whose_shapes_do_not_fit(numbers: Any, shapes: Any) -> None:
    with pytest.raises(ValueError, match="the arrays have"):
        Packing.of(np.array(numbers), shapes)


@pytest.mark.parametrize("position", [-1, len(STORED_ARRAYS), 2**63, 0.0, None, "0", True])
def test_a_position_outside_the_packing(position: Any) -> None:
    packing = Packing()
    packed = packing.pack(make_spectrum(-0.2))
    with pytest.raises(ValueError, match="`nodes` of a spectrum is missing or invalid, got"):
        packing.unpack({**packed, "nodes": position})


# A mistake in the program is no damage of a file ----------------------------------------------------------------------


def mistaken(*_: Any, **__: Any) -> Any:
    msg = "'NoneType' object has no attribute 'x'"
    raise AttributeError(msg)


def read_state(folder: Path) -> None:
    callback = HessianSpectrumCallback()
    callback.history.append(SpectrumRecord(0, 1, make_spectrum(-0.2)))
    HessianSpectrumCallback().load_state_dict(callback.state_dict())


def read_results(folder: Path) -> None:
    checkpoint = folder / "a.ckpt"
    checkpoint.touch()
    Results(folder, {}).keep("a", checkpoint, SpectrumRecord(0, 1, make_spectrum(-0.2)))
    Results(folder, {}).known("a", checkpoint)


def read_payload(folder: Path) -> None:
    payload_reading.read_payload(payload.to_json(payload.record_payload(SpectrumRecord(0, 1, make_spectrum(-0.2)))))


@pytest.mark.parametrize(
    ("module", "name", "read"),
    [
        (spectrum_data, "check_rules", lambda folder: Spectrum.load(next(folder.glob("*.npz")))),
        (spectrum_data, "check_spectrum", SpectrumHistory.load),
        (codec, "check_comparable", SpectrumHistory.load),
        (codec, "check_fields", read_state),
        (spectrum_data, "check_rules", read_results),
        (payload_reading, "check_fields", read_payload),
    ],
    ids=["spectrum", "history", "comparison", "state", "results", "payload"],
)
def test_a_mistake_of_the_program_is_not_called_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, read: Callable[[Path], object]
) -> None:
    history_of(SpectrumRecord(0, 1, make_spectrum(-0.2), generalization=make_spectrum(-0.3))).save(tmp_path)
    read(tmp_path)  # nothing is damaged
    monkeypatch.setattr(module, name, mistaken)
    with pytest.raises(AttributeError, match="has no attribute 'x'"):
        read(tmp_path)
