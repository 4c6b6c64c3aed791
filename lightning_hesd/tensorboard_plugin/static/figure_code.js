/** Python code that draws a figure again, from the log directory. */

import { when } from "./axis.js";

/** Return a text as a literal of Python, in which only plain characters stand for themselves. */
const quoted = (text) => JSON.stringify(String(text)).replace(/[\u007f-\uffff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);

const ofHistory = (plot) => ({ plot, calls: [["", `${plot}(history, new_axes(*SIZE))`]] });
const ofScalars = (...keys) => ({ plot: "plot_scalar", calls: keys.map((key) => [key, `plot_scalar(history, ${quoted(key)}, new_axes(*SIZE))`]) });
const ofSpectra = (plot, fields, { record, axis }) => ({
  plot,
  calls: fields.filter((field) => record.spectra[field]).map((field) => [field, `${plot}(record.${field}, new_axes(*SIZE), ${quoted(when(record, axis))})`]),
});
const BOTH_DATA = ["spectrum", "generalization"];

/** By figure: the plot function, and a call for each chart, with a suffix for the name of its file. */
const CODE = {
  ct: () => ofHistory("plot_c_t"),
  extremes: () => ofScalars("lambda_max", "lambda_min"),
  deltas: () => ofScalars("delta_r_e", "delta_k_h05"),
  loss: () => ofScalars("loss"),
  metric: ({ runs }) => ofScalars(...ruleMetricOf(runs)),
  map: () => ofHistory("plot_density_evolution"),
  density: (shown) => ofSpectra("plot_density", BOTH_DATA, shown),
  cumulative: (shown) => ofSpectra("plot_cumulative", BOTH_DATA, shown),
  along: (shown) => ofSpectra("plot_losses_along", ["spectrum"], shown),
  layers: ({ quantity }) => ({ plot: "plot_layers", calls: [["", `plot_layers(history, ${quoted(quantity)})`]] }),
};

/** Return the metric of the checkpoint rules in a list, which is empty where a run's records do not have it. */
const ruleMetricOf = (runs) =>
  [...new Set(runs.flatMap((run) => run.rules.filter((rule) => rule.metrics.length).map((rule) => rule.metric)))]
    .filter((name) => runs.every((run) => run.records.some((record) => name in (record.metrics ?? {})))).slice(0, 1);

/**
 * Return the code of a figure; null where there is none.
 * @param {{id: string, title: string, runs: Object[], record: ?Object, axis: Object, quantity: ?string}} shown
 * @param {number[]} size Width and height in inches.
 * @param {string[]} folders Log directories of the runs.
 */
export function codeOf(shown, size, folders) {
  const { plot, calls } = CODE[shown.id]?.(shown) ?? { calls: [] };
  if (!calls.length) return null;
  const names = shown.runs.map((run) => JSON.parse(run.key)[1]);
  const runs = shown.runs.map((run, index) => `    (${[run.run, folders[index], names[index]].map(quoted).join(", ")}),`);
  const charts = calls.flatMap(([suffix, call]) => [
    `    ax = ${call}`,
    ...(shown.record ? [] : ["    ax.set_title(run, fontsize=10)"]),
    `    ax.figure.savefig(f"hesd-${[shown.id, suffix].filter(Boolean).join("-")}-{number}.pdf")`,
  ]);
  return [
    `# ${shown.title}`,
    "import matplotlib",
    "from lightning_hesd import SpectrumHistory",
    `from lightning_hesd.plotting import new_axes, ${plot}`,
    "",
    'matplotlib.rcParams["pdf.fonttype"] = 42  # fonts that journals accept',
    `SIZE = ${size.join(", ")}  # inches`,
    "RUNS = [  # title, log directory, name of the callback",
    ...runs,
    "]",
    "",
    "for number, (run, log_dir, name) in enumerate(RUNS, start=1):",
    "    history = SpectrumHistory.load(log_dir, name)",
    ...(shown.record ? [`    record = next(r for r in history if r.global_step == ${shown.record.global_step})`] : []),
    ...charts,
    "",
  ].join("\n");
}
