/** Densities and numbers of eigenvalues from payloads of spectra, computed as `spectra/distribution.py` does. Pure functions. */

import { minus } from "./base.js";
import { extent, spectrumOf } from "./data.js";

const MAP_BINS = 140;
const MAP_SMOOTHING = 1.2; // bins
const LINEAR_SHARE = 1e-4; // eigenvalues below this share of the largest are drawn on a linear scale

/**
 * Return the distribution as uniform pieces, {low, high, mass}: the weight of a node is spread such that the node is the
 * mean. A piece with equal ends is a point.
 */
function piecesOf({ nodes, weights, left, right }) {
  return nodes.flatMap((node, i) => {
    const [before, after] = [left[i], right[i]];
    const below = before + after > 0 ? (weights[i] * after) / (before + after) : weights[i];
    return [{ low: node - before, high: node, mass: below }, { low: node, high: node + after, mass: weights[i] - below }];
  }).filter(({ mass }) => mass > 0);
}

/** Return the share of eigenvalues up to a threshold. */
function cumulative(pieces, threshold) {
  const share = ({ low, high }) => (low < high ? Math.min(Math.max((threshold - low) / (high - low), 0), 1) : Number(low <= threshold));
  return pieces.reduce((sum, piece) => sum + piece.mass * share(piece), 0);
}

// Scales ------------------------------------------------------------------------------------------------------------

/** A scale that is logarithmic for large eigenvalues of both signs, and linear around zero; `slope`: dλ at a place. */
function symlog(linear) {
  const to = (value) => Math.sign(value) * Math.log10(1 + Math.abs(value) / linear);
  const back = (place) => Math.sign(place) * linear * (10 ** Math.abs(place) - 1);
  return { linear, to, back, slope: (place) => linear * Math.LN10 * 10 ** Math.abs(place) };
}

const same = (value) => value;
const LINEAR = { linear: null, to: same, back: same, slope: () => 1 };

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

/** Write zero, or a power of ten with its sign. */
export function powerOfTen(value) {
  if (value === 0) return "0";
  const exponent = Math.round(Math.log10(Math.abs(value)));
  const sign = value < 0 ? "−" : "";
  if (exponent >= -2 && exponent <= 3) return sign + String(Number((10 ** exponent).toPrecision(1)));
  return `${sign}10<sup>${minus(exponent)}</sup>`;
}

const MOST_DECADES = 5; // smaller extremes are drawn near zero
const FEWEST_DECADES = 2; // on the larger side of zero

/** Return the scale of an axis on which the extremes of each spectrum differ from zero; linear, or logarithmic on both sides. */
export function axisOfDensity(spectra, isLinear) {
  const [low, high] = extent(spectra.flatMap((s) => [s.lambda_min, s.lambda_max]));
  if (isLinear) return { ...LINEAR, low, high };
  const sizes = spectra.flatMap((s) => [s.lambda_min, s.lambda_max].map(Math.abs).filter((size) => size > (s.rounding ?? 0)));
  const [smallest, largest] = sizes.length ? extent(sizes) : [1, 1];
  const within = Math.min(Math.max(smallest, largest * 10 ** -MOST_DECADES), largest * 10 ** -FEWEST_DECADES);
  return { ...symlog(10 ** Math.floor(Math.log10(within) + 1e-9)), low: Math.min(low, 0), high: Math.max(high, 0) };
}

// Smoothed densities ---------------------------------------------------------------------------------------------------

const DECADES = 0.06; // standard deviation of the smoothing on a logarithmic axis, as in `plot_density_evolution`
const REACH = 8; // standard deviations beyond which a Gaussian is nothing
const POINTS = 400;

const PANEL = [[-0.906179845938664, 0.118463442528095], [-0.538469310105683, 0.239314335249683], [0, 0.284444444444444],
  [0.538469310105683, 0.239314335249683], [0.906179845938664, 0.118463442528095]]; // Gauss-Legendre points and weights

/** Return the standard deviation of the smoothing on a scale, in units of its places. */
export function smoothingOf(spectrum, scale) {
  if (scale.linear !== null) return DECADES;
  return spectrum.sigma ?? (Math.max(Math.abs(spectrum.lambda_min), Math.abs(spectrum.lambda_max)) * 0.01 || 1);
}

/** Return points on a scale, [place, mass], that give the same density as a piece where Gaussians smooth it. */
function centersOf({ low, high, mass }, scale, sigma) {
  const [from, to] = [scale.to(low), scale.to(high)];
  const panels = Math.ceil((to - from) / sigma);
  if (panels === 0) return [[from, mass]];
  const half = (to - from) / (2 * panels);
  return Array.from({ length: panels }, (_, i) => from + half * (2 * i + 1))
    .flatMap((middle) => PANEL.map(([place, share]) => [middle + half * place, (2 * half * share * mass * scale.slope(middle + half * place)) / (high - low)]));
}

/** Return the sum of Gaussians, [place, mass] each, at ascending places. */
function sumOfGaussians(centers, places, sigma) {
  const values = new Float64Array(places.length);
  const norm = 1 / (sigma * Math.sqrt(2 * Math.PI));
  for (const [center, mass] of centers)
    for (let i = firstFrom(places, center - REACH * sigma); i < places.length && places[i] <= center + REACH * sigma; i++)
      values[i] += mass * norm * Math.exp(-0.5 * ((places[i] - center) / sigma) ** 2);
  return values;
}

/** Return the position of the first of some ascending values that is at least `value`. */
function firstFrom(values, value) {
  let [low, high] = [0, values.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/**
 * Return the density with respect to places on a scale: their grid, the values there, and the band {low, high} that contains
 * the smoothed density of the true eigenvalues; null without one.
 */
export function densityOn(spectrum, scale) {
  const sigma = smoothingOf(spectrum, scale);
  const [from, to] = [scale.to(spectrum.lambda_min) - 5 * sigma, scale.to(spectrum.lambda_max) + 5 * sigma];
  const regular = Array.from({ length: POINTS }, (_, i) => from + ((to - from) * i) / (POINTS - 1));
  const grid = [...new Set([...regular, ...spectrum.nodes.map(scale.to), 0])].filter((t) => t >= from && t <= to).sort((a, b) => a - b);
  const centers = piecesOf(spectrum).flatMap((piece) => centersOf(piece, scale, sigma));
  return { grid, values: [...sumOfGaussians(centers, grid, sigma)], band: bandOn(spectrum, scale, sigma, grid) };
}

/**
 * Return the bounds that the band of the cumulative distribution, L ≤ F ≤ U, gives for the density smoothed by a kernel K.
 * That is ∫ F(t) K'(x − t) dt, in which K' is positive right of x and negative left of it. So it is largest with U right of x
 * and L left of it, and smallest the other way round; integrated by parts, with the steps of L and U as masses.
 */
function bandOn({ cumulative_band: band, dimension }, scale, sigma, grid) {
  if (!band) return null;
  const places = band.points.map(scale.to);
  const steps = (counts) => counts.map((count, i) => (count - (i ? counts[i - 1] : 0)) / dimension);
  const [lowSteps, highSteps] = [steps(band.low), steps(band.high)];
  const peak = 1 / (sigma * Math.sqrt(2 * Math.PI));
  const ends = grid.map((x) => {
    const passed = places.findLastIndex((place) => place <= x) + 1;
    const doubt = passed ? (peak * (band.high[passed - 1] - band.low[passed - 1])) / dimension : 0;
    let [low, high] = [-doubt, doubt];
    for (let i = firstFrom(places, x - REACH * sigma); i < places.length && places[i] <= x + REACH * sigma; i++) {
      const kernel = peak * Math.exp(-0.5 * ((places[i] - x) / sigma) ** 2);
      low += kernel * (i < passed ? highSteps[i] : lowSteps[i]);
      high += kernel * (i < passed ? lowSteps[i] : highSteps[i]);
    }
    return [Math.max(low, 0), high];
  });
  return { low: ends.map(([low]) => low), high: ends.map(([, high]) => high) };
}

/**
 * Return the spectral mass over records and eigenvalues: a column for each record, as log10 of the mass in a bin.
 * Converged nodes are few, so all is smoothed over neighboring bins.
 */
export function densityMap(run) {
  const spectra = run.records.map((record) => spectrumOf(record)).filter(Boolean);
  const scale = scaleOf(spectra.map((s) => [s.lambda_min, s.lambda_max]));
  const [from, to] = [scale.to(scale.low), scale.to(scale.high)];
  const width = (to - from) / MAP_BINS || 1;
  const centers = Array.from({ length: MAP_BINS }, (_, i) => from + (i + 0.5) * width);
  const reach = Math.ceil(4 * MAP_SMOOTHING);
  const rows = centers.map(() => []);
  for (const record of run.records) {
    const spectrum = spectrumOf(record);
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
