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

/** Return what a figure of densities shows: {density: label, field, key: of its run, run, step} of each spectrum. */
const densitiesOf = ({ data }) => data.filter(({ meta, visible }) => meta?.density && visible === true).map(({ meta }) => meta);

/** The spectrum of the chosen state as `plot_density` draws it; several, or only a pinned one, as `plot_densities` does. */
function ofDensities(shown) {
  const drawn = densitiesOf(shown.figure);
  if (drawn.length === 1 && drawn[0].step === shown.record.global_step) return ofSpectra("plot_density", [drawn[0].field], shown);
  const historyOf = (key) => (shown.runs.length === 1 ? "history" : `history[${quoted(titlesOf(shown.runs)[shown.runs.findIndex((run) => run.key === key)])}]`);
  const setup = [
    "", "",
    "def at(records, step):",
    "    return next(record for record in records if record.global_step == step)",
    "", "",
    "spectra = {",
    ...drawn.map(({ density, field, key, step }) => `    ${quoted(density)}: at(${historyOf(key)}, ${step}).${field},`),
    "}",
  ];
  return { plot: "plot_densities", setup, calls: [["", "plot_densities(spectra, new_axes(*SIZE))"]] };
}

/** Return the runs that a figure needs: those of the page, and of pinned states. */
export function runsOf({ id, runs, figure }) {
  if (id !== "density") return runs;
  const found = densitiesOf(figure).map(({ key, run }) => ({ key, run }));
  return found.filter(({ key }, index) => found.findIndex((other) => other.key === key) === index);
}

/** Return titles of runs that differ: with the name of the callback where a run has several. */
const titlesOf = (runs) => runs.map(({ key, run }) => (runs.filter((other) => other.run === run).length > 1 ? `${run}, ${callbackOf(key)}` : run));
const callbackOf = (key) => JSON.parse(key)[1];

/** By figure: the plot function, and a call for each chart, with a suffix for the name of its file. */
const CODE = {
  ct: ({ runs }) => (runs.length > 1 ? ofScalars("c_t") : ofHistory("plot_c_t")),
  extremes: () => ofScalars("lambda_max", "lambda_min"),
  deltas: () => ofScalars("delta_r_e", "delta_k_h05"),
  loss: () => ofScalars("loss"),
  metric: ({ runs }) => ofScalars(...ruleMetricOf(runs)),
  map: () => ofHistory("plot_density_evolution"),
  density: ofDensities,
  cumulative: (shown) => ofSpectra("plot_cumulative", BOTH_DATA, shown),
  along: (shown) => ofSpectra("plot_losses_along", ["spectrum"], shown),
  layers: ({ quantity }) => ({ plot: "plot_layers", calls: [["", `plot_layers(history, ${quoted(quantity)})`]] }),
};

/** Return the metric of the checkpoint rules in a list, which is empty where a run's records do not have it. */
const ruleMetricOf = (runs) =>
  [...new Set(runs.flatMap((run) => run.rules.filter((rule) => rule.metrics.length).map((rule) => rule.metric)))]
    .filter((name) => runs.every((run) => run.records.some((record) => name in record.metrics))).slice(0, 1);

/**
 * Return the code of a figure; null where there is none.
 * @param {{id: string, title: string, runs: Object[], record: ?Object, axis: Object, quantity: ?string, figure: Object}} shown With
 *   the runs of `runsOf`.
 * @param {number[]} size Width and height in inches.
 * @param {string[]} folders Log directories of the runs.
 */
export function codeOf(shown, size, folders) {
  const { plot, setup, calls } = CODE[shown.id]?.(shown) ?? { calls: [] };
  if (!calls.length) return null;
  const titles = titlesOf(shown.runs);
  const loaded = shown.runs.map(({ key }, index) => `SpectrumHistory.load(${quoted(folders[index])}, ${quoted(callbackOf(key))})`);
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
    ...(setup ?? []),
    ...(shown.record && !setup ? [`record = next(r for r in history if r.global_step == ${shown.record.global_step})`] : []),
    ...calls.flatMap(([suffix, call]) => [
      `ax = ${call}`,
      ...(isOfOne && !shown.record ? [`ax.set_title(${quoted(titles[0])}, fontsize=10)`] : []),
      `ax.figure.savefig("hesd-${[shown.id, suffix].filter(Boolean).join("-")}.pdf")`,
    ]),
    "",
  ].join("\n");
}
