/** Numbers to draw, from payloads; densities: distribution.js. Pure functions; fields and units: docs/tensorboard-plugin.md. */

/**
 * A run as the page holds it; `scalars` describes the scalars: lists of {key, title, unit, is_logarithmic}.
 * @typedef {{key: string, run: string, name: string, color: number, scalars: Object<string, Object[]>,
 *   records: Object[], rules: Object[], problems: string[]}} Run
 */

/** The spectra that a record may have: the field, the name in legends and tables, the name in full, and the dash of lines. */
export const SPECTRA = [
  { field: "spectrum", label: "training", title: "Hessian, training data", dash: "solid" },
  { field: "generalization", label: "generalization", title: "Hessian, generalization data", dash: "dash" },
  { field: "preconditioned", label: "preconditioned", title: "Preconditioned Hessian", dash: "dashdot" },
  { field: "ggn", label: "Gauss–Newton", title: "Gauss–Newton matrix", dash: "dot" },
  { field: "residual", label: "residual", title: "Residual: Hessian − Gauss–Newton", dash: "longdash" },
];

export const spectrumOf = (record, field = "spectrum") => record.spectra[field] ?? null;

/** Return the values of a run's records, null where there is none. */
export function column(run, valueOf) {
  return run.records.map((record) => valueOf(record) ?? null);
}

/** Return the description of a scalar: of "spectrum", "record" or "layers". */
export const scalarOf = (run, group, key) => run.scalars[group].find((scalar) => scalar.key === key);

export const ofSpectrum = (key, field = "spectrum") => (record) => spectrumOf(record, field)?.[key] ?? null;

export function finite(values) {
  return values.filter((value) => value !== null && Number.isFinite(value));
}

export function median(values) {
  const sorted = finite(values).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(sorted.length / 2)] : null;
}

/** Smallest and largest in one pass: spreading long arrays into Math.min overflows the stack. */
export function extent(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value === null || !Number.isFinite(value)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

// Numbers of eigenvalues ---------------------------------------------------------------------------------------------

/** Return an interval of whole numbers in words. */
export const interval = (low, high) => (low === high ? String(low) : `${low} to ${high}`);

/** Return the number of negative eigenvalues in words; null where it is unknown. */
export function negativeCount(spectrum) {
  const { negative_count_low: low, negative_count_high: high } = spectrum ?? {};
  return Number.isFinite(low) && Number.isFinite(high) ? interval(low, high) : null;
}

// Loss along eigenvectors --------------------------------------------------------------------------------------------

/** Return L + st + λt²/2, which the loss follows near zero, at distances around it; the slope is that next to zero. */
export function parabola({ distances, losses }, eigenvalue) {
  const middle = (distances.length - 1) / 2;
  const [before, at, after] = losses.slice(middle - 1, middle + 2);
  if ([before, at, after].includes(null)) return distances.map(() => null);
  const slope = (after - before) / (distances[middle + 1] - distances[middle - 1]);
  return distances.map((t) => at + slope * t + (eigenvalue * t ** 2) / 2);
}

// Layers ------------------------------------------------------------------------------------------------------------

/** Return the descriptions of the quantities of layers that a run has values of. */
export const quantitiesOf = (run) =>
  run.scalars.layers.filter(({ key }) => run.records.some((r) => r.layers[key] && finite(r.layers[key]).length));

/** Return the key of the quantity to show: the wanted one where the run has it, else the usual one; null: none. */
export function quantityOf(run, wanted) {
  const keys = quantitiesOf(run).map(({ key }) => key);
  return [wanted, "lambda_max", "trace_share", ...keys].find((key) => keys.includes(key)) ?? null;
}

/**
 * Return names of layers in the order of the network, and the place of each in the lists of each record: a row for each
 * layer, null in records without it.
 */
export function layerMap(run) {
  const names = [...new Set(run.records.flatMap((record) => record.layers.name))];
  const places = run.records.map((record) => new Map(record.layers.name.map((name, place) => [name, place])));
  return { names, rows: names.map((name) => places.map((places) => places.get(name) ?? null)) };
}

// Tables ------------------------------------------------------------------------------------------------------------

const pickedBy = (run, r) =>
  run.rules.filter((rule) => rule.pick?.global_step === r.global_step).map((rule) => rule.title).join(", ") || null;

/** Return the columns of the data table: functions of a run and a record, by name. The data name the scalars. */
function columnsOf({ spectrum, generalization, record }) {
  const of = (scalars, prefix, valueOf) => scalars.map(({ key }) => [prefix + key, (_, r) => valueOf(key, r)]);
  return Object.fromEntries([
    ["run", (run) => run.run],
    ["epoch", (_, r) => r.epoch],
    ["step", (_, r) => r.global_step],
    ...of(spectrum, "", (key, r) => ofSpectrum(key)(r)),
    ["negative_count", (_, r) => negativeCount(spectrumOf(r))],
    ["type", (_, r) => ofSpectrum("type")(r)],
    ...of(generalization, "generalization_", (key, r) => ofSpectrum(key, "generalization")(r)),
    ...of(record, "", (key, r) => r[key] ?? null),
    ["verdict", (_, r) => r.assessment?.verdict ?? null],
    ["picked_by", pickedBy],
  ]);
}

/** Return head and rows of the table of all records, without empty columns. */
export function tableOf(runs) {
  const columns = columnsOf(runs[0].scalars);
  const names = Object.keys(columns);
  const rows = runs.flatMap((run) => run.records.map((record) => names.map((name) => columns[name](run, record))));
  const kept = names.map((_, index) => index).filter((index) => rows.some((row) => row[index] !== null));
  return { head: kept.map((i) => names[i]), rows: rows.map((row) => kept.map((i) => row[i])) };
}

/** Return a table as CSV. Texts that a spreadsheet would take for a formula get an apostrophe. */
export function toCsv({ head, rows }) {
  const cell = (value) => {
    if (value === null) return "";
    const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [head, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}
