"""The notebook runs, shows figures and tables, and its page in the documentation is that of its present cells."""

import json
import re
from pathlib import Path

import numpy as np
from matplotlib.image import imread

from tests.programs import run_python

HERE = Path(__file__).parents[1] / "examples" / "notebook"


def cells(kind: str) -> list[str]:
    notebook = json.loads((HERE / "first_steps.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def assert_shows_the_notebook(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"```python\n(.*?)\n```", text, flags=re.DOTALL) == cells("code")
    assert all(cell in text for cell in cells("markdown"))
    return text


def test_it_runs_and_shows_figures_and_tables(tmp_path: Path) -> None:
    run_python("-m", "examples.notebook", "--out", str(tmp_path))
    text = assert_shows_the_notebook(tmp_path / "first_steps.md")
    figures = re.findall(r"first_steps-\d+\.png", text)
    assert len(figures) == len(set(figures)) == sum("plot(" in cell for cell in cells("code")) + 1  # and the spectrum
    for name in figures:
        assert np.ptp(imread(tmp_path / name)[..., :3]) > 0.5, f"{name} is empty"
    assert text.count("<table>") == 4  # two histories, layers, and a judgment
    assert "hesd: all spectra are in logs/digits/version_0/hesd; `lightning-hesd report logs/digits/version_0`" in text
    assert "hesd: highest C_t picks epoch " in text


def test_its_page_is_up_to_date_and_it_has_no_outputs() -> None:
    text = assert_shows_the_notebook(HERE / "results" / "first_steps.md")
    assert all((HERE / "results" / name).is_file() for name in re.findall(r"first_steps-\d+\.png", text))
    notebook = json.loads((HERE / "first_steps.ipynb").read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])
