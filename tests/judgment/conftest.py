from __future__ import annotations

import pytest

from lightning_hesd.spectra.record import SpectrumRecord
from lightning_hesd.spectra.rules import RULES
from tests.judgment.simulated import BASELINES


@pytest.fixture(autouse=True)
def baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter the baselines into the registry."""
    for rule in BASELINES:
        if rule.name not in RULES:
            monkeypatch.setitem(RULES, rule.name, rule)
    if not hasattr(SpectrumRecord, "validation_loss"):
        monkeypatch.setattr(SpectrumRecord, "validation_loss", None, raising=False)
