/** Numbers to draw, from payloads. Pure functions; fields and units: docs/tensorboard-plugin.md. */

/**
 * A run as the page holds it; `scalars` describes the scalars: lists of {key, title, unit, is_logarithmic}.
 * @typedef {{key: string, run: string, name: string, color: number, scalars: Object<string, Object[]>,
 *   records: Object[], rules: Object[], problems: string[]}} Run
 */

const MAP_BINS = 140;
const MAP_SMOOTHING = 1.2; // bins
const LINEAR_SHARE = 1e-4; // eigenvalues below this share of the largest are drawn on a linear scale

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

// Densities ---------------------------------------------------------------------------------------------------------

/**
 * Return the distribution as uniform pieces, {low, high, mass}, as in `spectra/distribution.py`: the weight of a node is
 * spread such that the node is the mean. A piece with equal ends is a point, as all are in payloads of earlier releases.
 */
function piecesOf({ nodes, weights, left, right }) {
  return nodes.flatMap((node, i) => {
    const [before, after] = [left?.[i] ?? 0, right?.[i] ?? 0];
    const below = before + after > 0 ? (weights[i] * after) / (before + after) : weights[i];
    return [{ low: node - before, high: node, mass: below }, { low: node, high: node + after, mass: weights[i] - below }];
  }).filter(({ mass }) => mass > 0);
}

/** Return the share of eigenvalues up to a threshold. */
function cumulative(pieces, threshold) {
  const share = ({ low, high }) => (low < high ? Math.min(Math.max((threshold - low) / (high - low), 0), 1) : Number(low <= threshold));
  return pieces.reduce((sum, piece) => sum + piece.mass * share(piece), 0);
}

const PANEL = [[-0.906179845938664, 0.118463442528095], [-0.538469310105683, 0.239314335249683], [0, 0.284444444444444],
  [0.538469310105683, 0.239314335249683], [0.906179845938664, 0.118463442528095]]; // Gauss-Legendre points and weights

/** Return points, [place, mass], that give the same density as a piece where Gaussians of width `sigma` smooth it. */
function centersOf({ low, high, mass }, sigma) {
  const panels = Math.ceil((high - low) / sigma);
  if (panels === 0) return [[low, mass]];
  const half = (high - low) / (2 * panels);
  return Array.from({ length: panels }, (_, i) => low + half * (2 * i + 1))
    .flatMap((middle) => PANEL.map(([place, share]) => [middle + half * place, (mass * share) / panels]));
}

/** Return a grid and the density on it, smoothed by Gaussians of width `sigma`, as `plot_density` draws it. */
export function density(spectrum, points = 400) {
  const { lambda_min: low, lambda_max: high, nodes } = spectrum;
  const width = high - low;
  const sigma = spectrum.sigma ?? (Math.max(Math.abs(low), Math.abs(high)) * 0.01 || 1);
  const [from, to] = [low - 5 * sigma - 0.01 * width, high + 5 * sigma + 0.01 * width];
  const regular = Array.from({ length: points }, (_, i) => from + ((to - from) * i) / (points - 1));
  const grid = [...new Set([...regular, ...nodes, 0])].filter((t) => t >= from && t <= to).sort((a, b) => a - b);
  const norm = 1 / (sigma * Math.sqrt(2 * Math.PI));
  const centers = piecesOf(spectrum).flatMap((piece) => centersOf(piece, sigma));
  const values = grid.map((t) => centers.reduce((sum, [place, mass]) => sum + mass * Math.exp(-0.5 * ((t - place) / sigma) ** 2), 0) * norm);
  return { grid, values };
}

/** A scale that is logarithmic for large eigenvalues of both signs, and linear around zero. */
function symlog(linear) {
  const to = (value) => Math.sign(value) * Math.log10(1 + Math.abs(value) / linear);
  const back = (place) => Math.sign(place) * linear * (10 ** Math.abs(place) - 1);
  return { linear, to, back };
}

/** Return the scale for eigenvalues within some extremes, [low, high] each, and how far it reaches. */
export function scaleOf(extremes, linearShare = LINEAR_SHARE) {
  const [low, high] = extent(extremes.flat());
  const largest = Math.max(Math.abs(low), Math.abs(high)) || 1;
  return { ...symlog(10 ** Math.round(Math.log10(largest * linearShare))), low: Math.min(low, 0), high: Math.max(high, 0) };
}

/** Return places and texts of ticks at powers of ten. */
export function symlogTicks(scale) {
  const exponents = [];
  const first = Math.round(Math.log10(scale.linear));
  const last = Math.floor(Math.log10(Math.max(scale.high, -scale.low)));
  const step = Math.max(1, Math.ceil((last - first) / 4));
  for (let e = last; e > first; e -= step) exponents.push(e);
  const values = [0, ...exponents.flatMap((e) => [10 ** e, -(10 ** e)])].filter((v) => v >= scale.low && v <= scale.high);
  return { places: values.map(scale.to), texts: values.map(powerOfTen) };
}

function powerOfTen(value) {
  if (value === 0) return "0";
  const exponent = Math.round(Math.log10(Math.abs(value)));
  const sign = value < 0 ? "−" : "";
  if (exponent >= -2 && exponent <= 3) return sign + String(Number((10 ** exponent).toPrecision(1)));
  return `${sign}10<sup>${String(exponent).replace("-", "−")}</sup>`;
}

/**
 * Return the spectral mass over records and eigenvalues: a column for each record, as log10 of the mass in a bin.
 * Converged nodes are few, so all is smoothed over neighboring bins.
 */
export function densityMap(run, field) {
  const spectra = run.records.map((record) => spectrumOf(record, field)).filter(Boolean);
  const scale = scaleOf(spectra.map((s) => [s.lambda_min, s.lambda_max]));
  const [from, to] = [scale.to(scale.low), scale.to(scale.high)];
  const width = (to - from) / MAP_BINS || 1;
  const centers = Array.from({ length: MAP_BINS }, (_, i) => from + (i + 0.5) * width);
  const reach = Math.ceil(4 * MAP_SMOOTHING);
  const rows = centers.map(() => []);
  for (const record of run.records) {
    const spectrum = spectrumOf(record, field);
    const mass = new Float64Array(MAP_BINS);
    const map = { to: (value) => (scale.to(value) - from) / width - 0.5, back: (place) => scale.back(from + (place + 0.5) * width) };
    if (spectrum) piecesOf(spectrum).flatMap((piece) => partsOf(piece, map)).forEach((part) => smooth(part, mass, reach));
    for (let i = 0; i < MAP_BINS; i++) rows[i].push(mass[i] > 1e-9 ? Math.log10(mass[i]) : null);
  }
  return { scale, centers, rows };
}

/** Return parts of a piece, [place, mass], each at most one bin wide. */
function partsOf({ low, high, mass }, map) {
  const [from, to] = [map.to(low), map.to(high)];
  const count = Math.ceil(to - from);
  if (count === 0) return [[from, mass]];
  const end = (i) => map.back(from + ((to - from) * i) / count);
  return Array.from({ length: count }, (_, i) => [from + ((to - from) * (i + 0.5)) / count, (mass * (end(i + 1) - end(i))) / (high - low)]);
}

function smooth([place, share], mass, reach) {
  const [first, last] = [Math.max(Math.round(place) - reach, 0), Math.min(Math.round(place) + reach, mass.length - 1)];
  const gaussian = (i) => Math.exp(-0.5 * ((i - place) / MAP_SMOOTHING) ** 2);
  let total = 0;
  for (let i = first; i <= last; i++) total += gaussian(i);
  for (let i = first; i <= last; i++) mass[i] += (share * gaussian(i)) / total;
}

// Numbers of eigenvalues ---------------------------------------------------------------------------------------------

/** Return an interval of whole numbers in words. */
export const interval = (low, high) => (low === high ? String(low) : `${low} to ${high}`);

/** Return the number of negative eigenvalues in words; null where it is unknown. */
export function negativeCount(spectrum) {
  const { negative_count_low: low, negative_count_high: high } = spectrum ?? {};
  return Number.isFinite(low) && Number.isFinite(high) ? interval(low, high) : null;
}

const PARTS = 8; // of a uniform piece of the distribution, in each of which the curve of numbers is level

/**
 * Return the numbers of eigenvalues farther from zero than thresholds: below those up to zero, and above the others.
 * Each side is a list of {side, threshold, found, low, high}, which hold until the next threshold.
 */
export function beyond(spectrum) {
  const { cumulative_band: band, dimension } = spectrum;
  const pieces = piecesOf(spectrum);
  const inner = pieces.flatMap(({ low, high }) => (low < high ? Array.from({ length: PARTS + 1 }, (_, i) => low + ((high - low) * i) / PARTS) : []));
  const thresholds = [...new Set([0, ...band.points, ...inner])].sort((a, b) => a - b);
  const at = (threshold, isAbove) => {
    const isCounted = (value) => (isAbove || threshold < 0 ? value <= threshold : value < threshold); // zero is not below zero
    const index = band.points.findLastIndex(isCounted);
    const [low, high] = index < 0 ? [0, 0] : [band.low[index], band.high[index]];
    const share = cumulative(pieces.filter((piece) => isCounted(piece.low)), threshold);
    const found = Math.min(Math.max(dimension * share, low), high); // the band also knows that numbers are whole
    if (!isAbove) return { side: "below", threshold, found, low, high };
    return { side: "above", threshold, found: dimension - found, low: dimension - high, high: dimension - low };
  };
  const side = (isAbove) => thresholds.filter((t) => (isAbove ? t >= 0 : t <= 0)).map((t) => at(t, isAbove));
  return [side(false), side(true)];
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
