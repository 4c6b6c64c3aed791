/** The chosen state in numbers: what its analysis found, how sure each number is, and what is unusual about the spectrum. */

import { short } from "./base.js";
import { SPECTRA, negativeCount, spectrumOf } from "./data.js";
import { element, number, typeset, withMinus } from "./dom.js";
import { intervalOf, totalError, withError, within } from "./uncertainty.js";

const UNASKED = "pass sampling_error=True";

/** Rows of the table: the name, its explanation, and a function of a spectrum; "–" where it has none. */
const ROWS = [
  ["C_t", "λ_min over λ_max, where they have these signs", (s) => (s.c_t === null ? (s.type === "MN" ? "−∞" : "undefined") : within(s.c_t, s.c_t_low, s.c_t_high))],
  ["Lanczos interval", "contains the C_t of these samples with the given confidence; without the sampling error",
    (s) => (s.c_t === null ? "–" : intervalOf(s.c_t_low, s.c_t_high))],
  ["sampling error", "one standard error of C_t, because the samples are a part of all data", (s) => withSize(s.c_t_sampling_error)],
  ["total error", "the farther end of the Lanczos interval and one standard error", (s) => (totalError(s) === null ? "–" : `± ${withSize(totalError(s))}`)],
  ["type", "MP: C_t above the threshold", (s) => (s.type === null ? "–" : s.type + (s.type_certain ? "" : ", not certain"))],
  ["λ_max", "an eigenvalue lies within the error", (s) => withError(s.lambda_max, s.lambda_max_error)],
  ["λ_min", "an eigenvalue lies within the error", (s) => withError(s.lambda_min, s.lambda_min_error)],
  ["trace", "one standard error", (s) => withError(s.trace, s.trace_error)],
  ["negative eigenvalues", "bounds, with the same confidence", (s) => (negativeCount(s) === null ? "–" : `${negativeCount(s)} of ${s.dimension}`)],
  ["loss", "mean over the samples", (s) => number(s.loss)],
  ["samples", "", (s) => number(s.num_samples)],
  ["Lanczos steps", "of each probe", (s) => (s.steps_per_probe ?? []).join(", ") || "–"],
  ["verified", "Hessian-vector products were compared with differences of the loss", (s) => s.verified ?? "unknown"],
];

/** Write an error with one or two digits. */
const withSize = (error) => (Number.isFinite(error ?? NaN) ? short(Number(error.toPrecision(2))) : "–");

/** Return the table of the spectra of a record; null: it has none. */
function tableOfSpectra(record) {
  const present = SPECTRA.map((one) => ({ ...one, spectrum: spectrumOf(record, one.field) })).filter(({ spectrum }) => spectrum);
  if (!present.length) return null;
  const rows = ROWS.map(([name, why, textOf]) => ({ name, why, texts: present.map(({ spectrum }) => textOf(spectrum)) }));
  const reason = present.map(({ spectrum }) => spectrum.sampling_reason).find(Boolean) ?? UNASKED;
  const isSampled = present.some(({ spectrum }) => totalError(spectrum) !== null);
  const cell = (text) => element("td", { class: "number" }, text);
  return element("table", { class: "numbers" },
    element("thead", {}, element("tr", {}, element("td"), ...present.map(({ title }) => element("th", { scope: "col" }, title)))),
    element("tbody", {}, ...rows.map(({ name, why, texts }) => {
      const isUnknown = !isSampled && (name === "sampling error" || name === "total error");
      const cells = isUnknown ? [element("td", { class: "unknown", colspan: present.length }, name === "total error" ? "unknown" : `not estimated: ${reason}`)] : texts.map(cell);
      const [{ spectrum: { confidence } }] = present;
      const title = name === "Lanczos interval" ? `${name}, ${percent(confidence)}` : name;
      return element("tr", { "data-row": name }, element("th", { scope: "row", title: why || null }, ...typeset(title)), ...cells);
    })));
}

// Badges -----------------------------------------------------------------------------------------------------------------

/** Return what is unusual about a state: {badge, kind, why}; kind "fine", "doubt" or "wrong". */
export function badgesOf(record) {
  const found = (key) => record.findings.find((finding) => finding.key === key);
  const spectrum = spectrumOf(record);
  const badges = [];
  if (record.error) badges.push({ badge: spectrum ? "a part failed" : "failed", kind: "wrong", why: record.error });
  if (!spectrum) return badges;
  if (spectrum.reason) badges.push({ badge: "no C_t", kind: "doubt", why: spectrum.reason });
  if (spectrum.type === "MN") badges.push(mainlyNegative(record, spectrum, found("mainly_negative")));
  const singular = found("quasi_singular");
  if (singular) badges.push({ badge: "quasi-singular", kind: "doubt", why: withMinus(`${singular.evidence} ${singular.action}`) });
  const { verified, verification } = spectrum;
  badges.push({ badge: VERIFIED[verified], kind: { yes: "fine", no: "wrong" }[verified] ?? "doubt", why: verification });
  return badges;
}

const VERIFIED = { yes: "verified", no: "wrong products", unknown: "not verified" };

function mainlyNegative({ epoch, thresholds }, { c_t, type_certain: isCertain }, finding) {
  if (!isCertain) return { badge: "MN?", kind: "doubt", why: `C_t may be above or below ${short(thresholds.c_t)}, or the products are not verified.` };
  // The title names the cause: “MN: the weights look untrained”.
  if (finding) return { badge: "MN", kind: "doubt", why: `${finding.title.replace(/^MN: /, "")}. ${finding.evidence} ${finding.action}` };
  const why = epoch < 0 ? "the weights are random: those before the first step." : `C_t is ${c_t === null ? "−∞" : short(c_t)}; the criteria for generalization do not apply.`;
  return { badge: "MN", kind: "doubt", why };
}

// Gradients and stability ------------------------------------------------------------------------------------------------

/** Return sentences about the optimizer: its stability, and what it did to the gradients. */
function ofOptimizer({ stability_ratio: ratio, gradients = {} }) {
  const sentences = [];
  if (ratio !== null && ratio !== undefined)
    sentences.push(`Stability ratio: the preconditioned λ_max is ${number(ratio, 3)} times the largest at which the optimizer is stable${ratio >= 1 ? ": it is beyond the edge of stability" : ""}.`);
  if (gradients.clipped_share !== undefined) {
    const { steps, clipped_share: share, clip_factor: factor, gradient_cosine: cosine, update_cosine: update } = gradients;
    const clipped = share > 0
      ? `clipped in ${percent(share)} of ${steps} sampled steps, to ${number(factor, 2)} of their norm on average; cosine of before and after ${number(cosine, 3)}`
      : `not clipped in ${steps} sampled steps`;
    sentences.push(`Gradients of this epoch: ${clipped}. Cosine of gradient and update: ${number(update, 2)}.`);
  }
  return sentences;
}

const percent = (share) => `${number(100 * share, 2)} %`;

/** Return the contents of the card of a state. */
export function stateOf(record) {
  const table = tableOfSpectra(record);
  return [
    element("ul", { class: "badges" }, ...badgesOf(record).map(({ badge, kind, why }) =>
      element("li", {}, element("span", { class: `badge ${kind}`, "data-badge": badge }, ...typeset(badge)), element("span", {}, why)))),
    table && element("div", { class: "scroll-x", tabindex: "0", role: "region", "aria-label": "Numbers of the chosen state" }, table),
    ...ofOptimizer(record).map((text) => element("p", {}, ...typeset(text))),
  ].filter(Boolean);
}
