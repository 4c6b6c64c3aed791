/** Figures of several runs over training, as plain {data, layout} for Plotly. */

import { MARGIN, horizontal, indexed, layoutOf, literal, logTicks, minus, note, ratios } from "./base.js";
import { axisOf, column, extent, ofSpectrum, scalarOf, when } from "./data.js";
import { SYMBOLS, colorOf, faint } from "./theme.js";
import { errorBars } from "./uncertainty.js";

const FEW = 80; // records up to which each gets a mark

/** Return a curve over the records of a run: in its color, with its mark, in the dash of the quantity. */
function curve(run, axis, theme, values, { dash = "solid", label, digits = 4, yaxis = "y", candidates = null }) {
  const color = colorOf(theme, run.color);
  const few = run.records.length <= FEW;
  return {
    x: run.records.map((r) => r[axis.key]), y: values, yaxis, name: literal(run.run), legendgroup: run.key, showlegend: false,
    mode: few ? "lines+markers" : "lines",
    line: { color: color, width: 1.8, dash },
    ...(few ? { marker: marks(run, color, theme, candidates) } : {}),
    customdata: run.records.map((r) => [when(r, axis), r.global_step]),
    hovertemplate: `${literal(run.run)}<br>%{customdata[0]}<br>${indexed(label)} = %{y:.${digits}g}<extra></extra>`,
    meta: { key: run.key },
  };
}

/** Return marks, filled for candidates; without a rule, all are filled. */
function marks(run, color, theme, candidates) {
  return {
    symbol: SYMBOLS[run.color % SYMBOLS.length], size: 6.5, line: { color: color, width: 1.5 },
    color: run.records.map((r) => (!candidates || candidates.has(r.global_step) ? color : theme.paper)),
  };
}

/** Return the entries of the legend: the runs if there are several, and the meanings of marks and dashes. */
function legend(runs, theme, meanings) {
  const entry = (name, more) => ({ x: [null], y: [null], name, hoverinfo: "skip", showlegend: true, ...more });
  const named = runs.length < 2 ? [] : runs.map((run) =>
    entry(literal(run.run), {
      legendgroup: run.key, mode: "lines+markers", line: { color: colorOf(theme, run.color), width: 1.8 },
      marker: { symbol: SYMBOLS[run.color % SYMBOLS.length], size: 7 },
    })
  );
  return [...named, ...meanings.map(([name, more]) => entry(name, more))];
}

const dashed = (name, dash, theme) => [indexed(name), { mode: "lines", line: { color: theme.muted, width: 1.8, dash } }];

const marked = (name, symbol, theme, filled = true) => [
  indexed(name),
  { mode: "markers", marker: { symbol, size: symbol === "star" ? 12 : 7, color: filled ? theme.muted : theme.paper,
    line: { color: theme.muted, width: 1.5 } } },
];

/** Return the rules of a run that rank by a scalar; of several checkpoint callbacks with one rule, the first. */
const rulesBy = (run, scalar) =>
  run.rules.filter((rule, index, all) => rule.scalar === scalar && all.findIndex((one) => one.rule === rule.rule) === index);

/** Return marks at the picks of rules, and a pale underlay where there are too many candidates to mark each. */
function picksOf(runs, axis, theme, scalar, valueOf) {
  return runs.flatMap((run) => rulesBy(run, scalar).flatMap((rule) => {
    const color = colorOf(theme, run.color);
    const at = run.records.filter((record) => record.global_step === rule.pick?.global_step);
    const candidates = new Set(rule.candidates);
    const x = run.records.map((r) => r[axis.key]);
    const underlay = {
      x, y: run.records.map((r) => (candidates.has(r.global_step) ? valueOf(r) : null)), mode: "lines", connectgaps: false,
      line: { color: faint(color, 0.3), width: 9 }, hoverinfo: "skip", showlegend: false, legendgroup: run.key,
    };
    const star = {
      x: at.map((r) => r[axis.key]), y: at.map(valueOf), mode: "markers", showlegend: false, legendgroup: run.key,
      name: `pick: ${literal(rule.title)}`,
      marker: { symbol: "star", size: 15, color: color, line: { color: theme.text, width: 1 } },
      customdata: at.map((r) => [when(r, axis), r.global_step]), meta: { key: run.key, pick: rule.rule },
      hovertemplate: `${literal(run.run)}<br>${rule.title === rule.rule ? literal(rule.title) : indexed(rule.title)} picks %{customdata[0]}<extra></extra>`,
    };
    return run.records.length > FEW ? [underlay, star] : [star];
  }));
}

/** Return entries of the legend for the picks of rules that rank by a scalar. */
const starsOf = (runs, scalar, theme) =>
  [...new Set(runs.flatMap((run) => rulesBy(run, scalar).map((rule) => rule.title)))].map((title) => marked(title, "star", theme));

// C_t ---------------------------------------------------------------------------------------------------------------

/** C_t with its interval, the threshold, and MP and MN shaded. On the logarithmic axis it is -C_t, upside down. */
export function ctFigure(runs, theme, logarithmic, threshold) {
  const axis = axisOf(runs);
  const show = (value) => (!logarithmic || value === null ? value : value < 0 ? -value : null);
  const values = runs.map((run) => column(run, (r) => show(ofSpectrum("c_t")(r))));
  const ends = runs.flatMap((run) =>
    run.records.flatMap((r) => ["c_t", "c_t_low", "c_t_high"].map((key) => show(ofSpectrum(key)(r))))
  );
  const range = logarithmic ? reversedLog(ends, -threshold) : linear(values.flat(), ends, threshold);
  const data = runs.flatMap((run, index) => [
    band(run, axis, theme, show, 0.28 / Math.sqrt(runs.length)),
    { ...curve(run, axis, theme, values[index], { label: logarithmic ? "−C_t" : "C_t", candidates: candidatesOf(run, "c_t") }),
      ...errorBars(run.records, show, colorOf(theme, run.color)) },
  ]);
  const at = show(threshold);
  const edge = (index) => (logarithmic ? 10 ** range[index] : range[index]);
  const shade = (y0, y1, color) => ({ type: "rect", layer: "below", xref: "paper", x0: 0, x1: 1, y0, y1, fillcolor: color, line: { width: 0 } });
  const place = logarithmic ? Math.log10(at) : at;
  return {
    data: [
      ...data,
      ...picksOf(runs, axis, theme, "c_t", (r) => show(ofSpectrum("c_t")(r))),
      ...legend(runs, theme, [
        marked("candidate", "circle", theme), marked("not a candidate", "circle", theme, false), ...starsOf(runs, "c_t", theme),
      ]),
    ],
    layout: layoutOf(
      theme, { title: axis.title }, {
        title: logarithmic ? "C_t (log)" : "C_t", range, type: logarithmic ? "log" : "linear",
        ...(logarithmic ? negated(ratios(10 ** range[1], 10 ** range[0])) : {}),
      },
      {
        shapes: [shade(at, edge(1), theme.positive), shade(edge(0), at, theme.negative), horizontal(at, theme)],
        annotations: [note(`MP ↑<br>${minus(threshold)}<br>MN ↓`, place)],
      }
    ),
  };
}

const negated = ({ tickvals }) => ({ tickvals, ticktext: tickvals.map((value) => `−${value}`) });

const candidatesOf = (run, scalar) => new Set(rulesBy(run, scalar).flatMap((rule) => rule.candidates));

function linear(values, ends, threshold) {
  const [low] = extent([threshold, ...values]);
  // An interval without a lower end to speak of must not flatten the curve.
  const [lowest] = extent([...ends, low].filter((v) => v !== null && v >= 1.5 * low));
  return [lowest * 1.08, -lowest * 0.04];
}

function reversedLog(values, threshold) {
  const [low, high] = extent([threshold, ...values.filter((v) => v > 0)]);
  return [Math.log10(high * 1.5), Math.log10(Math.max(low / 1.6, high * 1e-8))];
}

function band(run, axis, theme, show, opacity) {
  const inside = run.records.filter((r) => show(ofSpectrum("c_t_low")(r)) !== null && show(ofSpectrum("c_t_high")(r)) !== null);
  const x = inside.map((r) => r[axis.key]);
  const [low, high] = ["c_t_low", "c_t_high"].map((key) => inside.map((r) => show(ofSpectrum(key)(r))));
  return {
    x: [...x, ...x.toReversed()], y: [...high, ...low.toReversed()], fill: "toself", mode: "lines", line: { width: 0 },
    fillcolor: faint(colorOf(theme, run.color), opacity), hoverinfo: "skip", showlegend: false, legendgroup: run.key, meta: { band: run.key },
  };
}

// Other curves ------------------------------------------------------------------------------------------------------

export function extremesFigure(runs, theme) {
  const axis = axisOf(runs);
  const positive = (key, sign) => (record) => {
    const value = ofSpectrum(key)(record);
    return value !== null && sign * value > 0 ? sign * value : null;
  };
  const data = runs.flatMap((run) => [
    curve(run, axis, theme, column(run, positive("lambda_max", 1)), { label: "λ_max", candidates: candidatesOf(run, "lambda_max") }),
    curve(run, axis, theme, column(run, positive("lambda_min", -1)), { label: "−λ_min", dash: "dot" }),
  ]);
  return {
    data: [
      ...data,
      ...picksOf(runs, axis, theme, "lambda_max", positive("lambda_max", 1)),
      ...legend(runs, theme, [dashed("λ_max", "solid", theme), dashed("−λ_min", "dot", theme), ...starsOf(runs, "lambda_max", theme)]),
    ],
    layout: layoutOf(theme, { title: axis.title }, { title: "eigenvalue (loss / parameter²)", type: "log", ...logTicks(data.flatMap((t) => t.y)) }),
  };
}

export function deltasFigure(runs, theme, thresholds) {
  const axis = axisOf(runs);
  const of = (key) => (record) => {
    return record[key] > 0 ? record[key] : null;
  };
  const quantities = [["delta_r_e", "solid"], ["delta_k_h05", "dot"]].map(([key, dash]) => [key, scalarOf(runs[0], "record", key).title, dash]);
  const data = runs.flatMap((run) =>
    quantities.map(([key, label, dash]) => curve(run, axis, theme, column(run, of(key)), { label, dash }))
  );
  const [least, most] = extent([thresholds.delta_k_h05, thresholds.delta_r_e, ...data.flatMap((trace) => trace.y)]);
  return {
    data: [...data, ...legend(runs, theme, quantities.map(([, label, dash]) => dashed(label, dash, theme)))],
    layout: layoutOf(
      theme, { title: axis.title },
      { title: "generalization / training (log)", type: "log", range: [Math.log10(least / 1.3), Math.log10(most * 1.3)], ...ratios(least / 1.3, most * 1.3) },
      {
        shapes: [horizontal(thresholds.delta_r_e, theme), horizontal(thresholds.delta_k_h05, theme, "dot")],
        annotations: [thresholds.delta_r_e, thresholds.delta_k_h05].map((value) => note(`&lt; ${value}`, Math.log10(value))),
      }
    ),
  };
}

export function lossFigure(runs, theme) {
  const axis = axisOf(runs);
  const positive = (valueOf) => (record) => (valueOf(record) > 0 ? valueOf(record) : null);
  const other = runs.some((run) => run.records.some((r) => r.spectra.generalization));
  const metrics = runs.map((run) => run.rules.find((rule) => rule.metrics.length) ?? null);
  const metric = metrics.find(Boolean)?.metric ?? null;
  const data = runs.flatMap((run, index) => {
    const byStep = new Map((metrics[index]?.metrics ?? []).map((m) => [m.global_step, m.value]));
    const curves = [curve(run, axis, theme, column(run, positive(ofSpectrum("loss"))), { label: "training loss" })];
    if (other)
      curves.push(curve(run, axis, theme, column(run, positive(ofSpectrum("loss", "generalization"))), { label: "generalization loss", dash: "dash" }));
    if (byStep.size && metrics[index].metric === metric)
      curves.push(curve(run, axis, theme, column(run, (r) => byStep.get(r.global_step)), { label: "metric", dash: "dot", yaxis: "y2" }));
    return curves;
  });
  const meanings = [dashed("training loss", "solid", theme)];
  if (other) meanings.push(dashed("generalization loss", "dash", theme));
  if (metric) meanings.push([`${literal(metric)} (right axis)`, dashed("", "dot", theme)[1]]);
  const second = { title: { text: literal(metric ?? "") }, overlaying: "y", side: "right", tickmode: "auto", showgrid: false, zeroline: false };
  return {
    data: [...data, ...legend(runs, theme, meanings)],
    layout: layoutOf(
      theme, { title: axis.title },
      { title: "mean loss (log)", type: "log", ...logTicks(data.filter((t) => t.yaxis === "y").flatMap((t) => t.y)) },
      metric ? { yaxis2: second, margin: { ...MARGIN, r: 64 } } : {}
    ),
  };
}
