"""The backend of the HESD tab: payloads from TensorBoard's data provider, as JSON, and the files of the frontend.

It reads data from the data provider only; names in requests are looked up there, and never become paths.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tensorboard import errors, plugin_util
from tensorboard.backend import http_util
from tensorboard.data import provider
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from lightning_hesd.judgment.judge import judge_payloads
from lightning_hesd.spectra.decisions import rewound, run_payload
from lightning_hesd.spectra.payload import PLUGIN_NAME, RECORD, SELECTION
from lightning_hesd.spectra.payload_reading import SELECTION_FIELDS, PayloadError, read_payload
from lightning_hesd.tensorboard_plugin.assets import PLOTLY, STATIC, content, content_type

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from werkzeug.wrappers import Request, Response

    Application = Callable[..., Any]

SAMPLES = 1000
"""Default number of records of a run that TensorBoard keeps; its own default is ten."""

ALL = 1_000_000
"""Number of records that --samples_per_plugin=hesd=0 keeps: all."""


OF_ONE_STATE = frozenset(("nodes", "weights", "left", "right", "cumulative_band", "losses_along"))
"""Fields of a spectrum that only the figures of one run need. They take more than nine tenths of a payload."""

WALL_TIME = "wall_time"
"""Key of the time at which a payload was written, which the server adds."""


class HESDPlugin(base_plugin.TBPlugin):  # type: ignore[misc]  # untyped
    """TensorBoard's HESD tab."""

    plugin_name = PLUGIN_NAME

    def __init__(self, context: base_plugin.TBContext) -> None:
        super().__init__(context)
        self._provider = context.data_provider
        self._samples = (context.sampling_hints or {}).get(PLUGIN_NAME, SAMPLES) or ALL

    def get_plugin_apps(self) -> dict[str, Application]:
        """Return the application for each route."""
        apps: dict[str, Application] = {f"/{name}": _asset_app(name) for name in (*STATIC, PLOTLY)}
        answers = {"/runs": self._runs, "/records": self._records, "/judgment": self._judgment}
        return {**apps, **{route: self._answer(find) for route, find in answers.items()}}

    def is_active(self) -> bool:
        """Return False: TensorBoard shows the tab when a run has payloads."""
        return False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Return the entry of the frontend."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="HESD")

    def _answer(self, find: Callable[[Request, Any, str], dict[str, Any]]) -> Application:
        """Return an application that answers in JSON, errors included."""

        @wrappers.Request.application
        def respond(request: Request) -> Response:
            try:
                if request.method != "GET":
                    return _respond(request, {"error": "only GET is answered here."}, 405)
                context, experiment = plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)
                return _respond(request, find(request, context, experiment))
            except errors.PublicError as error:
                return _respond(request, {"error": str(error)}, error.http_code)

        return respond

    def _runs(self, _request: Request, context: Any, experiment: str) -> dict[str, Any]:
        """Return the log directory, and the runs with payloads; values by callback change when records are added."""
        listed = self._listed(context, experiment)
        # In the order in which TensorBoard gives colors to runs, those without payloads included.
        runs = sorted(
            self._provider.list_runs(context, experiment_id=experiment),
            key=lambda run: (float("inf") if run.start_time is None else run.start_time, run.run_name),
        )
        return {
            "folder": self._provider.experiment_metadata(context, experiment_id=experiment).data_location,
            "runs": [
                {
                    "run": run.run_name,
                    "color": color,
                    "names": {
                        tag.removesuffix(f"/{RECORD}"): {
                            "last_step": series.max_step,
                            "changed": str(series.max_wall_time),
                        }
                        for tag, series in sorted(listed[run.run_name].items())
                        if tag.endswith(f"/{RECORD}")
                    },
                }
                for color, run in enumerate(runs)
                if run.run_name in listed
            ],
        }

    def _records(self, request: Request, context: Any, experiment: str) -> dict[str, Any]:
        """Return the payloads of a run, their times, the rules' decisions, and messages about unreadable payloads.

        Raises:
            NotFoundError: If the run, or the name in it, does not exist.
        """
        run, name = _argument(request, "run"), _argument(request, "name")
        listed = self._listed(context, experiment)
        tag = _tag_of_records(listed, run, name)
        rules = [other for other in listed[run] if other.startswith(f"{name}/{SELECTION}/")]
        read = self._read(context, experiment, [run], [tag, *rules]).get(run, {})
        problems: list[str] = []
        records = rewound(_payloads(read.get(tag, ()), problems))
        wall_times = [record.pop(WALL_TIME) for record in records]
        selections = [c for rule in rules for c in rewound(_payloads(read.get(rule, ()), problems, SELECTION_FIELDS))]
        answer = {**run_payload(run, name, records, selections, problems), "wall_times": wall_times}
        return {**answer, "records": _brief(records)} if "brief" in request.args else answer

    def _judgment(self, request: Request, context: Any, experiment: str) -> dict[str, Any]:
        """Return what the picks of the checkpoint rules were worth in runs, by a metric.

        Raises:
            InvalidArgumentError: If an argument is missing or given twice, or no run has the metric.
            NotFoundError: If a run, or the name in it, does not exist.
        """
        metric = _argument(request, "metric")
        runs, names = request.args.getlist("run"), request.args.getlist("name")
        if not runs or len(runs) != len(names):
            msg = f"each `run` needs a `name`, got {len(runs)} runs and {len(names)} names"
            raise errors.InvalidArgumentError(msg)
        if len(set(runs)) < len(runs):
            msg = "a `run` is given twice: runs must be independent"
            raise errors.InvalidArgumentError(msg)
        listed = self._listed(context, experiment)
        tags = {run: _tag_of_records(listed, run, name) for run, name in zip(runs, names, strict=True)}
        read = self._read(context, experiment, runs, list(set(tags.values())))
        # What cannot be read, /records reports.
        payloads = {run: rewound(_payloads(read.get(run, {}).get(tag, ()), [])) for run, tag in tags.items()}
        try:
            return judge_payloads(payloads, metric).to_dict()
        except ValueError as error:
            raise errors.InvalidArgumentError(str(error)) from error

    def _read(self, context: Any, experiment: str, runs: Sequence[str], tags: Sequence[str]) -> dict[str, Any]:
        """Return the data of tags by run and tag."""
        found: dict[str, Any] = self._provider.read_tensors(
            context,
            experiment_id=experiment,
            plugin_name=PLUGIN_NAME,
            downsample=self._samples,
            run_tag_filter=provider.RunTagFilter(runs=runs, tags=tags),
        )
        return found

    def _listed(self, context: Any, experiment: str) -> dict[str, Any]:
        found: dict[str, Any] = self._provider.list_tensors(context, experiment_id=experiment, plugin_name=PLUGIN_NAME)
        return found


class HESDLoader(base_plugin.TBLoader):  # type: ignore[misc]  # untyped
    """Loader of the plugin, which TensorBoard finds by the entry point."""

    def fix_flags(self, flags: argparse.Namespace) -> None:
        """Ask TensorBoard to keep more than ten records of a run."""
        flags.samples_per_plugin = {PLUGIN_NAME: SAMPLES, **(flags.samples_per_plugin or {})}

    def load(self, context: base_plugin.TBContext) -> HESDPlugin | None:
        """Return the plugin; None without a data provider."""
        return HESDPlugin(context) if context.data_provider is not None else None


def _tag_of_records(listed: Mapping[str, Any], run: str, name: str) -> str:
    """Return the tag of the records of a callback.

    Raises:
        NotFoundError: If the run, or the name in it, does not exist.
    """
    if run not in listed:
        msg = f"no run {run!r} with payloads of lightning_hesd"
        raise errors.NotFoundError(msg)
    tag = f"{name}/{RECORD}"
    if tag not in listed[run]:
        msg = f"run {run!r} has no records of a callback named {name!r}"
        raise errors.NotFoundError(msg)
    return tag


def _payloads(data: Iterable[Any], problems: list[str], *fields: Any) -> list[dict[str, Any]]:
    """Return the payloads that can be read, with their times; append messages about the others to `problems`."""
    found = []
    for datum in data:
        try:
            found.append({**read_payload(datum.numpy.tolist(), *fields), WALL_TIME: datum.wall_time})
        except PayloadError as error:  # noqa: PERF203 - one bad payload must not cost the others
            problems.append(f"step {datum.step}: {error}")
    return found


def _brief(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return records with what the charts of many runs need: without densities, layers, and findings but the last."""
    found = [
        {
            **record,
            "spectra": {
                field: {key: value for key, value in spectrum.items() if key not in OF_ONE_STATE}
                for field, spectrum in record["spectra"].items()
            },
            "layers": {"name": []},
            "findings": [],
        }
        for record in records
    ]
    if found:
        found[-1]["findings"] = records[-1]["findings"]
    return found


def _argument(request: Request, name: str) -> str:
    value = request.args.get(name)
    if not value:
        msg = f"the argument `{name}` is missing"
        raise errors.InvalidArgumentError(msg)
    return value


def _respond(request: Request, body: dict[str, Any], code: int = 200) -> Response:
    # In ASCII, because names of folders need not be text; without NaN, which browsers do not read.
    response: Response = http_util.Respond(request, json.dumps(body, allow_nan=False), "application/json", code=code)
    return response


def _asset_app(name: str) -> Application:
    @wrappers.Request.application
    def respond(request: Request) -> Response:
        try:
            found = content(name)
        except OSError as error:
            return _respond(request, {"error": f"{name} is missing from the installation: {error.strerror}"}, 404)
        # Plotly is large and does not change while TensorBoard runs.
        expires = 3600 if name == PLOTLY else 0
        response: Response = http_util.Respond(request, found, content_type(name), expires=expires)
        return response

    return respond
