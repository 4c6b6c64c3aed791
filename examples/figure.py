"""Draw a run of digits.py: the criteria and accuracies over its epochs, beside the density at the picked epoch.

The data come from the run's log directory: the spectra that the callback saved, and TensorBoard's scalars.

    python examples/figure.py runs/digits/resnet/version_0 resnet.png
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_hesd import Spectrum, SpectrumHistory
from lightning_hesd.plotting import plot_density
from lightning_hesd.spectra.criteria import MP_THRESHOLD

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOLERANCE = 0.01
BLUE, VERMILION = "#0072B2", "#D55E00"  # Okabe & Ito (2008): color-blind readers can tell them apart


@dataclass
class Run:
    """The data of the figure; epochs are 0-based, -1 is before training."""

    spectra: dict[int, Spectrum]
    train_acc: list[float]
    gen_acc: list[float]

    @classmethod
    def load(cls, log_dir: Path) -> Run:
        events = EventAccumulator(str(log_dir))
        events.Reload()
        train_acc, gen_acc = ([event.value for event in events.Scalars(tag)] for tag in ("train_acc", "gen_acc"))
        spectra = {r.epoch: r.spectrum for r in SpectrumHistory.load(log_dir) if r.spectrum is not None}
        return cls(spectra, train_acc, gen_acc)

    def candidates(self) -> list[int]:
        """Return the candidates of the HessianCheckpoints of digits.py."""
        trained = [epoch for epoch in self.spectra if epoch >= 0]
        best = max(self.train_acc[epoch] for epoch in trained)
        qualified = [epoch for epoch in trained if best - self.train_acc[epoch] <= TOLERANCE]
        return [epoch for epoch in qualified if self.spectra[epoch].hesd_type == "MP"]

    def picks(self) -> dict[str, int]:
        """Return the epoch each rule picks, by the rule's label."""
        return {
            "highest $C_t$": max(self.candidates(), key=lambda epoch: self.spectra[epoch].c_t),
            r"lowest $\lambda_{\max}$": min(self.candidates(), key=lambda epoch: self.spectra[epoch].lambda_max),
        }


def draw(run: Run, path: Path) -> None:
    """Draw the figure and write it to `path`."""
    figure = Figure(figsize=(11.0, 5.0), dpi=130, layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=(1, 0.95))
    top, middle, bottom = (figure.add_subplot(grid[row, 0]) for row in range(3))

    low, high = zip(*(spectrum.c_t_interval for spectrum in run.spectra.values()), strict=True)
    top.fill_between(list(run.spectra), low, high, color="0.75")
    draw_curve(top, run, {epoch: spectrum.c_t for epoch, spectrum in run.spectra.items()})
    top.axhline(MP_THRESHOLD, color="black", linestyle=":", linewidth=1)
    top.annotate(f"{MP_THRESHOLD}: MP above, MN below", (1, MP_THRESHOLD), (-4, 3), ("axes fraction", "data"),
                 "offset points", horizontalalignment="right", fontsize=8)  # fmt: skip
    top.set_yscale("symlog", linthresh=0.01)
    top.set_ylim(-1.5, 0)
    top.yaxis.set_major_locator(FixedLocator([-1, -0.1, -0.01, 0]))
    top.yaxis.set_minor_locator(NullLocator())
    top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    top.set_ylabel("$C_t$")
    top.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8.5, frameon=False, borderaxespad=0.2,
               handletextpad=0.2, columnspacing=1.2)  # fmt: skip

    draw_curve(middle, run, {epoch: spectrum.lambda_max for epoch, spectrum in run.spectra.items()})
    middle.set_yscale("log")
    middle.margins(y=0.15)
    middle.set_ylabel(r"$\lambda_{\max}$")

    bottom.plot(run.train_acc, color="0.5", linestyle="--", linewidth=1.2)
    bottom.plot(run.gen_acc, color="black", linewidth=0.8)
    draw_curve(bottom, run, {epoch: run.gen_acc[epoch] for epoch in run.spectra if epoch >= 0}, linestyle="none")
    for name, values in (("training", run.train_acc), ("generalization", run.gen_acc)):
        bottom.annotate(name, (len(values) - 1, values[-1]), (0, -14), "data", "offset points", fontsize=8,
                        horizontalalignment="right")  # fmt: skip
    bottom.set_ylabel("accuracy")
    bottom.set_xlabel("epoch")

    last = max(run.spectra)
    ticks = [epoch for epoch in run.spectra if epoch >= 0]
    ticks = ticks[:: 1 + len(ticks) // 12]
    for panel in (top, middle, bottom):
        panel.set_xlim(-1 - 0.03 * last, 1.03 * last)
        panel.set_xticks([-1, *ticks], ["start", *map(str, ticks)])
        panel.tick_params(labelbottom=panel is bottom)
        panel.grid(visible=True, alpha=0.3)
    figure.align_ylabels([top, middle, bottom])

    picked = next(iter(run.picks().values()))
    plot_density(run.spectra[picked], figure.add_subplot(grid[:, 1]), title=f"epoch {picked}")
    figure.savefig(path)


def draw_curve(panel: Axes, run: Run, values: dict[int, float], linestyle: str = "-") -> None:
    """Draw one quantity over epochs: candidates filled, others hollow, and the two picks."""
    panel.plot(list(values), list(values.values()), "o", linestyle=linestyle, color="black", linewidth=0.8,
               markersize=4, markerfacecolor="white", label="analyzed")  # fmt: skip
    candidates = run.candidates()
    panel.plot(candidates, [values[epoch] for epoch in candidates], "o", color="black", markersize=4, label="candidate")
    styles: tuple[dict[str, Any], ...] = (
        {"marker": "^", "color": BLUE, "markersize": 9},
        {"marker": "v", "color": VERMILION, "markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.8},
    )
    for (rule, epoch), style in zip(run.picks().items(), styles, strict=True):
        panel.plot([epoch], [values[epoch]], linestyle="none", label=f"{rule} ({epoch})", **style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log_dir", type=Path, help="log directory of the run")
    parser.add_argument("image", type=Path, help="file to write")
    args = parser.parse_args()
    draw(Run.load(args.log_dir), args.image)


if __name__ == "__main__":
    main()
