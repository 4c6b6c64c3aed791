/** The results in words, also for readers who cannot see the figures. */

import { when } from "./axis.js";
import { finite, negativeCount, spectrumOf } from "./data.js";
import { element, number, withMinus } from "./dom.js";
import { intervalOf, withError, within } from "./uncertainty.js";

/** Return the verdict on a record and its reasons. */
export function assessmentOf(record, axis) {
  const spectrum = spectrumOf(record);
  const parts = [element("p", { class: "verdict" }, ...verdict(record, axis))];
  if (record.error) parts.push(element("p", { class: "problem", role: "alert" }, `The analysis failed: ${record.error}`));
  if (spectrum) parts.push(element("p", {}, describe(spectrum)));
  const reasons = record.assessment?.reasons ?? [];
  if (reasons.length) parts.push(element("ul", {}, ...reasons.map((reason) => element("li", {}, withMinus(reason)))));
  return parts;
}

function verdict(record, axis) {
  const title = `${when(record, axis)}: `;
  if (record.assessment)
    return [title, "the paper's criteria ", element("strong", {}, CRITERIA[record.assessment.verdict]), " (Gabdullin 2025, Fig. 10; experimental)."];
  return [title, "not assessed; pass ", element("code", {}, "generalization_dataloader=..."), " to HessianSpectrumCallback."];
}

const CRITERIA = { good: "hold", poor: "fail", undecided: "are undecided", "not applicable": "do not apply" };

function describe(s) {
  if (s.type === null) return `C_t is undefined: ${s.reason ?? "no curvature"}`;
  const certain = s.type_certain ? "" : ", which is not certain";
  const value = s.c_t === null ? "−∞" : within(s.c_t, s.c_t_low, s.c_t_high);
  return (
    `On the training data C_t = ${value}, Lanczos interval ${intervalOf(s.c_t_low, s.c_t_high)} (confidence ${number(s.confidence)}, ` +
    `without sampling error): the spectrum is ${TYPES[s.type]}${certain}. λ_max = ${withError(s.lambda_max, s.lambda_max_error)}, ` +
    `λ_min = ${withError(s.lambda_min, s.lambda_min_error)}, ${negatives(s)}` +
    `loss ${number(s.loss)} over ${number(s.num_samples)} samples. ${verification(s)}`
  );
}

function negatives(s) {
  const count = negativeCount(s);
  return count === null ? "" : `${count} of ${s.dimension} eigenvalues are negative, `;
}

/** Return whether HVPs were found to be those of the loss, and the comparison behind that. */
function verification(s) {
  return s.verified === "yes" ? `Verified: ${s.verification}.` : `Not verified, so that the interval may be wrong: ${s.verification}.`;
}

const TYPES = { MP: "mainly positive (MP)", MN: "mainly negative (MN)" };

const FEW_WITHOUT = 5; // runs without findings that have a line each

/** Return the findings of runs, each as of its last record, the most important first; those of several runs unfold. */
export function findingsOf(runs) {
  const has = (run) => run.records.at(-1).findings.length > 0;
  const without = runs.filter((run) => !has(run));
  const gathered = without.length > FEW_WITHOUT;
  const said = runs.filter((run) => has(run) || !gathered).map((run) => (has(run) ? unfolding(run, runs.length === 1) : element("p", {}, `${run.run}: no findings`)));
  return gathered ? [...said, element("p", {}, `${without.length} runs have no findings.`)] : said;
}

function unfolding({ run, records }, isOpen) {
  const { findings } = records.at(-1);
  const items = findings.map(({ title, evidence, confidence, action }) =>
    element("li", {},
      element("p", {}, element("strong", {}, title), ` (${confidence}): `, withMinus(evidence)),
      element("p", { class: "why" }, `Next: ${action}`)));
  return element("details", { open: isOpen }, element("summary", {}, `${run}: ${findings.length === 1 ? "1 finding" : `${findings.length} findings`}`), element("ol", {}, ...items));
}

/** Return the pick of a rule, and the reason. */
export function pickOf(rule) {
  const pick = rule.pick;
  const what = pick ? `epoch ${pick.epoch} (step ${pick.global_step})` : "nothing yet";
  return element(
    "li",
    { "data-rule": rule.rule },
    element("p", {}, element("strong", {}, rule.title), ` takes `, element("strong", {}, what), rule.used ? "" : " (no checkpoint was kept by this rule)"),
    element("p", { class: "why" }, rule.why),
    pick?.path ? element("p", { class: "path" }, "Checkpoint: ", element("code", {}, pick.path)) : null
  );
}

/** Describe a figure in a sentence, from the last values of its curves. */
export function summary(title, runs, valuesOf) {
  const said = runs.map((run) => {
    const values = finite(valuesOf(run));
    return values.length ? `${run.run}: ${values.length} values, the last ${number(values.at(-1))}` : `${run.run}: none`;
  });
  return `${title}. ${said.join("; ")}. All values are in the data table.`;
}
