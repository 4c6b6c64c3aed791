/** Numbers with their errors: as many digits as are certain, and no more. Texts only. */

import { minus } from "./base.js";
import { number } from "./dom.js";

const MOST_DIGITS = 5; // payloads have seven

const isKnown = (value) => value !== null && value !== undefined && Number.isFinite(value);

/** Return the decimal place up to which a number with an error is worth writing: 2 for hundredths. Errors of 10 to 19 get two digits. */
function decimalsFor(error) {
  const place = Math.floor(Math.log10(error) + 1e-9);
  return (error / 10 ** place < 1.95 ? 1 : 0) - place;
}

/** Return a function that writes numbers, of these sizes, to a decimal place: rounded to the nearest, down or up. */
function writer(decimals, ...values) {
  const size = Math.max(...values.map(Math.abs));
  const isPlain = size >= 1e-3 && size < 1e5;
  return (value, round = Math.round) => {
    const steps = value * 10 ** decimals;
    const whole = Math.abs(steps - Math.round(steps)) < 1e-6 ? Math.round(steps) : round(steps); // of binary fractions
    const rounded = whole / 10 ** decimals;
    if (whole === 0 && !isPlain) return "0";
    if (isPlain) return minus(rounded.toFixed(Math.max(decimals, 0)).replace(/^-(0(\.0*)?)$/, "$1"));
    return minus(rounded.toExponential(Math.max(Math.floor(Math.log10(Math.abs(rounded)) + 1e-9) + decimals, 0)));
  };
}

const isNothing = (error, ...values) => error <= Math.max(...values.map(Math.abs)) * 10 ** -MOST_DIGITS;

/** Write “value ± error”: the error rounded up, the value to the same place. Without a known error, the value with few digits. */
export function withError(value, error) {
  if (!isKnown(value)) return "–";
  if (!isKnown(error)) return number(value, 3);
  if (isNothing(error, value)) return number(value, MOST_DIGITS);
  const write = writer(decimalsFor(error), value, error);
  return `${write(value)} ± ${write(error, Math.ceil)}`;
}

/** Write a number to the place that its interval leaves certain. */
export function within(value, low, high) {
  if (!isKnown(value)) return "–";
  if (!isKnown(low) || !isKnown(high)) return number(value, 3);
  const error = Math.max(value - low, high - value);
  return isNothing(error, value) ? number(value, MOST_DIGITS) : writer(decimalsFor(error), value, error)(value);
}

/** Write an interval, rounded outward to two digits of its width. */
export function intervalOf(low, high) {
  if (!isKnown(low) && !isKnown(high)) return "–";
  if (!isKnown(low) || !isKnown(high)) return `[${isKnown(low) ? number(low, 3) : "−∞"}, ${isKnown(high) ? number(high, 3) : "∞"}]`;
  if (isNothing(high - low, low, high)) return `[${number(low, MOST_DIGITS)}, ${number(high, MOST_DIGITS)}]`;
  const write = writer(1 - Math.floor(Math.log10(high - low) + 1e-9), low, high);
  return `[${write(low, Math.floor)}, ${write(high, Math.ceil)}]`;
}

/** Return the error of C_t with all that is known: the farther end of the Lanczos interval and one standard error; else null. */
export function totalError({ c_t, c_t_low, c_t_high, c_t_sampling_error: sampling }) {
  if (![c_t, c_t_low, c_t_high, sampling].every(isKnown)) return null;
  return Math.max(c_t - c_t_low, c_t_high - c_t) + sampling;
}

/** Return C_t less and plus its total error; nothing where that is not known. C_t is at most 0. */
export function totalEnds({ spectra: { spectrum } }) {
  const error = spectrum ? totalError(spectrum) : null;
  return error === null ? [] : [spectrum.c_t - error, Math.min(spectrum.c_t + error, 0)];
}

/** Return error bars of C_t for a curve of Plotly, where the sampling error is known; `show` maps C_t to the axis. */
export function errorBars(records, show, color) {
  const ends = records.map(totalEnds);
  if (!ends.some(({ length }) => length)) return {};
  const lengths = (end) => records.map(({ spectra: { spectrum } }, i) => {
    const [from, to] = [ends[i].length ? show(spectrum.c_t) : null, ends[i].length ? show(ends[i][end]) : null];
    return from === null || to === null ? null : Math.abs(to - from);
  });
  const [below, above] = [lengths(0), lengths(1)];
  const isUpsideDown = show(-1) > 0; // −C_t is drawn on the logarithmic axis
  const [array, arrayminus] = isUpsideDown ? [below, above] : [above, below];
  return { error_y: { type: "data", symmetric: false, array, arrayminus, thickness: 1.2, width: 4, color } };
}
