"""What is imported when the package, a callback, the command line or the tab starts."""

import subprocess
import sys

import pytest

CALLBACK = """
import sys
import lightning.pytorch
slow = {"matplotlib", "mpl_toolkits", "tensorboard", "plotly", "pandas"}
for name in list(sys.modules):  # Lightning itself brings some of them along, by way of torchmetrics
    if name.split(".")[0] in slow | {"lightning_hesd"}:
        del sys.modules[name]
import lightning_hesd
lightning_hesd.HessianSpectrumCallback(checkpoint="highest_c_t")
print(sorted(name for name in sys.modules if name.split(".")[0] in slow or name == "lightning_hesd.plotting"))
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
TAB_THAT_JUDGES = """
import sys
import lightning_hesd.tensorboard_plugin.plugin
from lightning_hesd import judge
from lightning_hesd.judgment.judge import judge_payloads
from lightning_hesd.spectra.payload import record_payload
from tests.judgment.simulated import record
payloads = {name: [record_payload(record(epoch, val_acc=0.5)) for epoch in range(2)] for name in "abcdefg"}
judge_payloads(payloads, "val_acc").to_dict()
print(sorted({"torch", "lightning", "matplotlib", "pandas", "scipy"} & set(sys.modules)))
"""


def last_line(program: str) -> str:
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return finished.stdout.splitlines()[-1]


def test_a_callback_loads_neither_matplotlib_nor_tensorboard() -> None:
    assert last_line(CALLBACK) == "[]"


@pytest.mark.parametrize("words", [["--help"], ["-h", "analyze"], ["judge", "--help"]])
def test_help_loads_no_torch(words: list[str]) -> None:
    assert last_line(COMMAND.format(words=words)) == "[]"


def test_the_tab_and_judging_load_no_torch() -> None:
    assert last_line(TAB_THAT_JUDGES) == "[]"
