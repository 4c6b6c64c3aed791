"""What is imported when the package, a callback, the command line or the tab starts, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

CALLBACK = """
import sys
import lightning.pytorch  # which brings Matplotlib along, by way of torchmetrics, but not all of it
before = set(sys.modules)
import lightning_hesd
lightning_hesd.HessianSpectrumCallback(checkpoint="highest_c_t")
slow = {"matplotlib", "mpl_toolkits", "tensorboard", "plotly", "pandas"}
new = set(sys.modules) - before
print(sorted(name for name in new if name.split(".")[0] in slow or name == "lightning_hesd.plotting"))
"""
COMMAND = """
import sys
sys.argv = ["lightning-hesd", *{words!r}]
from lightning_hesd.__main__ import main
try:
    main()
finally:
    slow = {{"torch", "lightning", "torchmetrics", "matplotlib", "tensorboard", "pandas", "rich"}}
    print(sorted(slow & set(sys.modules)))
"""


def last_line(program: str) -> str:
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return finished.stdout.splitlines()[-1]


def test_a_callback_loads_neither_matplotlib_nor_tensorboard() -> None:
    assert last_line(CALLBACK) == "[]"


@pytest.mark.parametrize("words", [["--help"], ["assess", "--help"], ["-h", "analyze"], ["judge", "--help"]])
def test_help_loads_no_torch(words: list[str]) -> None:
    assert last_line(COMMAND.format(words=words)) == "[]"


def test_judging_payloads_as_the_tab_does_loads_no_torch() -> None:
    program = """
import sys
from lightning_hesd.judgment.judge import judge_payloads
from lightning_hesd.spectra.payload import record_payload
from tests.judgment.simulated import record
payloads = {name: [record_payload(record(epoch, val_acc=0.5)) for epoch in range(2)] for name in "abcdefg"}
judge_payloads(payloads, "val_acc").to_dict()
"""
    slow = "{'torch', 'lightning', 'matplotlib', 'pandas', 'scipy'}"
    assert last_line(f"{program}print(sorted({slow} & set(sys.modules)))") == "[]"


def test_the_tab_loads_no_torch() -> None:
    plugin = "import sys, lightning_hesd.tensorboard_plugin.plugin\n"
    assert last_line(plugin + "print(sorted({'torch', 'lightning', 'matplotlib'} & set(sys.modules)))") == "[]"


def test_judging_records_loads_no_torch() -> None:
    program = "import sys; from lightning_hesd import judge\n"
    assert last_line(program + "print(sorted({'torch', 'lightning', 'matplotlib'} & set(sys.modules)))") == "[]"
