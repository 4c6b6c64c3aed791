/** The charts over training: what each shows of a run. */

import { minus } from "./base.js";
import { rulesBy } from "./curves.js";
import { column, extent, median, ofSpectrum, scalarOf } from "./data.js";
import { totalEnds } from "./uncertainty.js";

const SMALL = 0.1; // smaller values of C_t are legible on the logarithmic axis only

/**
 * A chart. `quantities` share its vertical axis: each has a label, a dash, the scalar that rules rank by (if any), `valuesOf` a run,
 * a value or null for each record, and perhaps `boundsOf` and `candidatesOf`. `missing` says why there is nothing to draw.
 * @typedef {{id: string, label: string, quantities: Object[], thresholds: {value: number, text: string, dash: string}[],
 *   isLogarithmic: boolean, isName: ?boolean, axisTitle: function(boolean): string, missing: ?string}} Chart
 */

/**
 * Return the charts of runs.
 * @param {Run[]} runs At least one.
 * @param {{c_t: number, delta_r_e: number, delta_k_h05: number}} thresholds
 * @returns {Chart[]}
 */
export const chartsOf = (runs, thresholds) =>
  [ctChart(runs, thresholds.c_t), extremesChart(runs), deltasChart(runs, thresholds), lossChart(runs), metricChart(runs)];

const logarithmicTitle = (title) => (logarithmic) => (logarithmic ? `${title} (log)` : title);

const hasValues = (runs, quantities) => quantities.some(({ valuesOf }) => runs.some((run) => valuesOf(run).some((value) => value !== null)));

const candidatesBy = (scalar) => (run) => new Set(rulesBy(run, scalar).flatMap((rule) => rule.candidates));

/** C_t with its interval, the threshold, and MP and MN shaded. On the logarithmic axis it is -C_t, upside down. */
function ctChart(runs, threshold) {
  const of = (key) => (run) => column(run, ofSpectrum(key));
  const middle = median(runs.flatMap(of("c_t")));
  const quantity = {
    label: "C_t", dash: "solid", scalar: "c_t", hasErrors: true, valuesOf: of("c_t"), boundsOf: (run) => [of("c_t_low")(run), of("c_t_high")(run)],
    candidatesOf: candidatesBy("c_t"),
  };
  return {
    id: "ct", label: "C_t", quantities: [quantity], isNegative: true, sides: threshold, axisTitle: logarithmicTitle("C_t"),
    isLogarithmic: middle !== null && middle < 0 && middle > -SMALL,
    thresholds: [{ value: threshold, text: `MP ↑<br>${minus(threshold)}<br>MN ↓`, dash: "dash" }],
    rangeOf: (lines, logarithmic) => {
      const values = lines.flatMap(({ y }) => y);
      const ends = lines.flatMap(({ low, high, records }) => [...(low ?? []), ...(high ?? []), ...(records ?? []).flatMap(totalEnds)]);
      return logarithmic ? reversedLog([...values, ...ends], threshold) : linearRange(values, ends, threshold);
    },
    missing: hasValues(runs, [quantity]) ? null : "No analysis gave a C_t; the assessment below says why.",
  };
}

function linearRange(values, ends, threshold) {
  const [low] = extent([threshold, ...values]);
  // An interval without a lower end to speak of must not flatten the curve.
  const [lowest] = extent([...ends, low].filter((v) => v !== null && v >= 1.5 * low));
  return [lowest * 1.08, -lowest * 0.04];
}

function reversedLog(values, threshold) {
  const [low, high] = extent([threshold, ...values].filter((v) => v < 0).map((v) => -v));
  return [Math.log10(high * 1.5), Math.log10(Math.max(low / 1.6, high * 1e-8))];
}

function extremesChart(runs) {
  const quantities = [
    { label: "λ_max", dash: "solid", scalar: "lambda_max", valuesOf: (run) => column(run, ofSpectrum("lambda_max")), candidatesOf: candidatesBy("lambda_max") },
    { label: "−λ_min", dash: "dot", valuesOf: (run) => column(run, ofSpectrum("lambda_min")).map((value) => (value === null ? null : -value)) },
  ];
  return {
    id: "extremes", label: "Largest eigenvalue", quantities, thresholds: [], isLogarithmic: true,
    axisTitle: () => "eigenvalue (loss / parameter²)",
    missing: hasValues(runs, quantities) ? null : "There is no spectrum on the training data.",
  };
}

function deltasChart(runs, thresholds) {
  const quantities = [["delta_r_e", "solid"], ["delta_k_h05", "dot"]].map(([key, dash]) => ({
    label: scalarOf(runs[0], "record", key).title, dash, threshold: thresholds[key], valuesOf: (run) => column(run, (record) => record[key]),
  }));
  return {
    id: "deltas", label: "Δr_e", quantities, isLogarithmic: true, axisTitle: logarithmicTitle("generalization / training"),
    thresholds: quantities.map(({ threshold, dash }) => ({ value: threshold, text: `&lt; ${threshold}`, dash: dash === "solid" ? "dash" : dash })),
    missing: runs.some((run) => run.records.some((r) => r.assessment)) ? null
      : "No generalization data were analyzed: pass generalization_dataloader=... to HessianSpectrumCallback.",
  };
}

function lossChart(runs) {
  const of = (field) => (run) => column(run, ofSpectrum("loss", field));
  const training = { label: "training loss", dash: "solid", valuesOf: of("spectrum") };
  const other = { label: "generalization loss", dash: "dash", valuesOf: of("generalization") };
  const quantities = [training, other].filter((quantity) => hasValues(runs, [quantity]));
  return {
    id: "loss", label: "Training loss", quantities, thresholds: [], isLogarithmic: true, axisTitle: logarithmicTitle("mean loss"),
    missing: quantities.length ? null : "No analysis has the loss of its samples.",
  };
}

/** The training metric of the checkpoint callbacks; that of the first run that has one. */
function metricChart(runs) {
  const ruleOf = (run) => run.rules.find((rule) => rule.metrics.length) ?? null;
  const metric = runs.map(ruleOf).find(Boolean)?.metric ?? null;
  const valuesOf = (run) => {
    const rule = ruleOf(run);
    const byStep = new Map((rule?.metric === metric ? rule.metrics : []).map((m) => [m.global_step, m.value]));
    return column(run, (record) => byStep.get(record.global_step));
  };
  const quantity = { label: metric ?? "metric", dash: "solid", valuesOf };
  return {
    id: "metric", label: "Training metric", isName: true, quantities: [quantity], thresholds: [], isLogarithmic: false, axisTitle: () => metric ?? "",
    missing: metric !== null ? null
      : "No checkpoint rule reads a logged metric: pass checkpoint=HessianCheckpoint(..., train_metric=...) to HessianSpectrumCallback.",
  };
}
