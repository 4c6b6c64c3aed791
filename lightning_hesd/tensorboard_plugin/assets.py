"""The files of the frontend: those of this package, and Plotly from its own package."""

from __future__ import annotations

from importlib.resources import files

SHARED = (
    "dom.js",
    "theme.js",
    "swatches.js",
    "data.js",
    "axis.js",
    "base.js",
    "distribution.js",
    "figure_code.js",
    "export.js",
    "uncertainty.js",
    "grouping.js",
    "curves.js",
    "charts.js",
    "details.js",
    "density.js",
    "layers.js",
    "state.js",
    "words.js",
    "reference.js",
    "datatable.js",
    "chosen.js",
    "values.js",
    "figures.js",
    "onerun.js",
    "allruns.js",
    "judgment.js",
    "address.js",
    "runstore.js",
    "runlist.js",
    "statebar.js",
    "layout.js",
    "page.js",
)
"""Modules of both frontends, each after the modules it imports."""

REPORT = "report.js"
REPORT_STYLE = "report.css"
STYLE = "style.css"
STATIC = ("index.js", *SHARED, STYLE)
"""Files that the tab may request."""

PLOTLY = "plotly.min.js"


def content(name: str) -> bytes:
    """Return the content of a file of `STATIC`, `REPORT`, `REPORT_STYLE` or `PLOTLY`."""
    if name == PLOTLY:
        return (files("plotly") / "package_data" / PLOTLY).read_bytes()
    return (files("lightning_hesd.tensorboard_plugin") / "static" / name).read_bytes()


def content_type(name: str) -> str:
    """Return the media type of a file."""
    return "text/css" if name.endswith(".css") else "text/javascript"
