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
  ct: ({ runs }) => (runs.length > 1 ? ofScalars("c_t") : ofHistory("plot_c_t")),
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
  const titles = shown.runs.map(({ run }, index) => (shown.runs.filter((other) => other.run === run).length > 1 ? `${run}, ${names[index]}` : run));
  const loaded = titles.map((_, index) => `SpectrumHistory.load(${quoted(folders[index])}, ${quoted(names[index])})`);
  const isOfOne = titles.length === 1;
  return [
    `# ${shown.title}`,
    "import matplotlib",
    "from lightning_hesd import SpectrumHistory",
    `from lightning_hesd.plotting import new_axes, ${plot}`,
    "",
    'matplotlib.rcParams["pdf.fonttype"] = 42  # fonts that journals accept',
    `SIZE = ${size.join(", ")}  # inches`,
    "",
    ...(isOfOne ? [`history = ${loaded[0]}`] : ["history = {", ...titles.map((title, index) => `    ${quoted(title)}: ${loaded[index]},`), "}"]),
    ...(shown.record ? [`record = next(r for r in history if r.global_step == ${shown.record.global_step})`] : []),
    ...calls.flatMap(([suffix, call]) => [
      `ax = ${call}`,
      ...(isOfOne && !shown.record ? [`ax.set_title(${quoted(titles[0])}, fontsize=10)`] : []),
      `ax.figure.savefig("hesd-${[shown.id, suffix].filter(Boolean).join("-")}.pdf")`,
    ]),
    "",
  ].join("\n");
}
