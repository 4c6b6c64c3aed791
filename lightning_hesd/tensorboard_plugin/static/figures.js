/** Plotly figures: what to draw, as plain {data, layout}. Pure functions of runs, theme and state. */

import {
  LAYER_QUANTITIES, axisOf, column, density, densityMap, extent, finite, layerMap, ofSpectrum, spectrumOf, symlogTicks, when,
} from "./data.js";
import { LOW_TO_HIGH, SYMBOLS, colourOf, faint } from "./theme.js";

const FEW = 80; // records up to which each gets a mark

/** Return a text that Plotly shows as it is: it would take markup in it for markup. */
export function literal(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll("%{", "%&#123;");
}

/** Return a text of this module with indices set low. */
const indexed = (text) => text.replace(/_([A-Za-z0-9]+)/g, "<sub>$1</sub>");

// Common parts ------------------------------------------------------------------------------------------------------

const MARGIN = { l: 72, r: 52, t: 10, b: 52 };

function layoutOf(theme, x, y, more = {}) {
  // Margins are fixed, since Plotly would take a third of the drawing time to find them.
  const axis = (given) => ({
    automargin: false, gridcolor: theme.grid, linecolor: theme.muted, zeroline: false, ticks: "outside", tickcolor: theme.grid,
    ...given, title: { text: indexed(given.title), standoff: 8 },
  });
  return {
    font: { family: "Roboto, 'Segoe UI', system-ui, sans-serif", size: 12, color: theme.text },
    paper_bgcolor: theme.paper, plot_bgcolor: theme.paper,
    margin: MARGIN,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", xanchor: "left", traceorder: "normal", font: { size: 11 } },
    hoverlabel: { font: { size: 12 } },
    hovermode: "closest",
    dragmode: "zoom",
    xaxis: axis(x), yaxis: axis(y),
    ...more,
  };
}

/** Return a curve over the records of a run: in its colour, with its mark, in the dash of the quantity. */
function curve(run, axis, theme, values, { dash = "solid", label, digits = 4, yaxis = "y", candidates = null }) {
  const colour = colourOf(theme, run.colour);
  const few = run.records.length <= FEW;
  return {
    x: run.records.map((r) => r[axis.key]), y: values, yaxis, name: literal(run.run), legendgroup: run.key, showlegend: false,
    mode: few ? "lines+markers" : "lines",
    line: { color: colour, width: 1.8, dash },
    ...(few ? { marker: marks(run, colour, theme, candidates) } : {}),
    customdata: run.records.map((r) => [when(r, axis), r.global_step]),
    hovertemplate: `${literal(run.run)}<br>%{customdata[0]}<br>${indexed(label)} = %{y:.${digits}g}<extra></extra>`,
    meta: { key: run.key },
  };
}

/** Return marks, filled for candidates; without rules, all are. */
function marks(run, colour, theme, candidates) {
  return {
    symbol: SYMBOLS[run.colour % SYMBOLS.length], size: 6.5, line: { color: colour, width: 1.5 },
    color: run.records.map((r) => (!candidates || candidates.has(r.global_step) ? colour : theme.paper)),
  };
}

/** Return the entries of the legend: a run each where there are several, and what marks and dashes mean. */
function legend(runs, theme, meanings) {
  const entry = (name, more) => ({ x: [null], y: [null], name, hoverinfo: "skip", showlegend: true, ...more });
  const named = runs.length < 2 ? [] : runs.map((run) =>
    entry(literal(run.run), {
      legendgroup: run.key, mode: "lines+markers", line: { color: colourOf(theme, run.colour), width: 1.8 },
      marker: { symbol: SYMBOLS[run.colour % SYMBOLS.length], size: 7 },
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

const ruleOf = (run, name) => run.rules.find((rule) => rule.rule === name) ?? null;

/** Return marks at the picks of a rule, and a pale underlay where there are too many candidates to mark each. */
function picksOf(runs, axis, theme, name, valueOf) {
  return runs.flatMap((run) => {
    const rule = ruleOf(run, name);
    if (!rule) return [];
    const colour = colourOf(theme, run.colour);
    const at = run.records.filter((record) => record.global_step === rule.pick?.global_step);
    const candidates = new Set(rule.candidates);
    const x = run.records.map((r) => r[axis.key]);
    const underlay = {
      x, y: run.records.map((r) => (candidates.has(r.global_step) ? valueOf(r) : null)), mode: "lines", connectgaps: false,
      line: { color: faint(colour, 0.3), width: 9 }, hoverinfo: "skip", showlegend: false, legendgroup: run.key,
    };
    const star = {
      x: at.map((r) => r[axis.key]), y: at.map(valueOf), mode: "markers", showlegend: false, legendgroup: run.key,
      name: `pick: ${literal(rule.title)}`,
      marker: { symbol: "star", size: 15, color: colour, line: { color: theme.text, width: 1 } },
      customdata: at.map((r) => [when(r, axis), r.global_step]), meta: { key: run.key, pick: rule.rule },
      hovertemplate: `${literal(run.run)}<br>${rule.title === rule.rule ? literal(rule.title) : indexed(rule.title)} picks %{customdata[0]}<extra></extra>`,
    };
    return run.records.length > FEW ? [underlay, star] : [star];
  });
}

function horizontal(value, theme, dash = "dash") {
  return { type: "line", xref: "paper", x0: 0, x1: 1, y0: value, y1: value, line: { color: theme.text, width: 1.2, dash } };
}

/** Return the line at the chosen record: white on black, to be seen on every colour of a heat map. */
export function cursor(record, axis) {
  if (record === null) return [];
  const line = { type: "line", yref: "paper", x0: record[axis.key], x1: record[axis.key], y0: 0, y1: 1 };
  return [
    { ...line, name: "chosen", line: { color: "rgba(0, 0, 0, 0.6)", width: 3 } },
    { ...line, line: { color: "#ffffff", width: 1.2, dash: "dash" } },
  ];
}

/** Return a text in the right margin. */
const note = (text, y) => ({ xref: "paper", x: 1, xanchor: "left", xshift: 4, y, yanchor: "middle", align: "left", text: indexed(text), showarrow: false, font: { size: 11 } });

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
    curve(run, axis, theme, values[index], { label: logarithmic ? "−C_t" : "C_t", candidates: candidatesOf(run, "highest_c_t") }),
  ]);
  const at = show(threshold);
  const edge = (index) => (logarithmic ? 10 ** range[index] : range[index]);
  const shade = (y0, y1, color) => ({ type: "rect", layer: "below", xref: "paper", x0: 0, x1: 1, y0, y1, fillcolor: color, line: { width: 0 } });
  const place = logarithmic ? Math.log10(at) : at;
  return {
    data: [
      ...data,
      ...picksOf(runs, axis, theme, "highest_c_t", (r) => show(ofSpectrum("c_t")(r))),
      ...legend(runs, theme, [
        marked("candidate", "circle", theme), marked("not a candidate", "circle", theme, false), marked("highest C_t", "star", theme),
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

const minus = (value) => String(value).replaceAll("-", "−");

const negated = ({ tickvals }) => ({ tickvals, ticktext: tickvals.map((value) => `−${value}`) });

const candidatesOf = (run, rule) => new Set(ruleOf(run, rule)?.candidates ?? []);

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
    fillcolor: faint(colourOf(theme, run.colour), opacity), hoverinfo: "skip", showlegend: false, legendgroup: run.key, meta: { band: run.key },
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
    curve(run, axis, theme, column(run, positive("lambda_max", 1)), { label: "λ_max", candidates: candidatesOf(run, "lowest_max_eigenvalue") }),
    curve(run, axis, theme, column(run, positive("lambda_min", -1)), { label: "−λ_min", dash: "dot" }),
  ]);
  return {
    data: [
      ...data,
      ...picksOf(runs, axis, theme, "lowest_max_eigenvalue", positive("lambda_max", 1)),
      ...legend(runs, theme, [dashed("λ_max", "solid", theme), dashed("−λ_min", "dot", theme), marked("lowest λ_max", "star", theme)]),
    ],
    layout: layoutOf(theme, { title: axis.title }, { title: "eigenvalue (loss / parameter²)", type: "log", ...powers }),
  };
}

const powers = { exponentformat: "power", dtick: 1, minor: { ticks: "outside", ticklen: 3 } };

export function deltasFigure(runs, theme, thresholds) {
  const axis = axisOf(runs);
  const of = (key) => (record) => {
    const value = record.assessment?.[key] ?? null;
    return value !== null && value > 0 ? value : null;
  };
  const quantities = [["delta_r_e", "Δr_e", "solid"], ["delta_k_h05", "ΔK_H05", "dot"]];
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

/** Ticks at 1, 2, 5 of each decade: ratios span little, and powers of ten would be too few. */
function ratios(low, high) {
  const tickvals = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
    for (const m of high / low > 200 ? [1] : high / low > 12 ? [1, 2, 5] : [1, 1.5, 2, 3, 5, 7]) tickvals.push(Number((m * 10 ** e).toPrecision(2)));
  return { tickvals, ticktext: tickvals.map(String) };
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
  const [least, most] = extent(data.filter((t) => t.yaxis === "y").flatMap((t) => t.y));
  return {
    data: [...data, ...legend(runs, theme, meanings)],
    layout: layoutOf(
      theme, { title: axis.title },
      { title: "mean loss (log)", type: "log", ...(most / least < 30 ? ratios(least / 1.2, most * 1.2) : powers) },
      metric ? { yaxis2: second, margin: { ...MARGIN, r: 64 } } : {}
    ),
  };
}

// One run in detail -------------------------------------------------------------------------------------------------

/** Return positions for columns of a heat map. */
const places = (run, axis) => run.records.map((record) => record[axis.key]);

export function mapFigure(run, theme, field, chosen) {
  const axis = axisOf([run]);
  const { scale, centres, rows } = densityMap(run, field);
  const x = places(run, axis);
  const ticks = symlogTicks(scale);
  const edge = (key) => ({
    x, y: column(run, ofSpectrum(key, field)).map((v) => (v === null ? null : scale.to(v))), mode: "lines", showlegend: false,
    line: { color: "#ffffff", width: 1.4 }, hoverinfo: "skip",
  });
  const eigenvalues = centres.map((place) => scale.back(place));
  return {
    data: [
      {
        type: "heatmap", x, y: centres, z: rows, colorscale: LOW_TO_HIGH, zmin: -6, zmax: 0, hoverongaps: false,
        colorbar: { title: { text: "log<sub>10</sub> mass", side: "right" }, thickness: 12, outlinewidth: 0 },
        customdata: eigenvalues.map((value) => new Array(x.length).fill(value)),
        hovertemplate: `${axis.short} %{x}<br>λ ≈ %{customdata:.3g}<br>log₁₀ mass %{z:.2f}<extra></extra>`,
      },
      edge("lambda_max"), edge("lambda_min"),
    ],
    layout: layoutOf(
      theme, { title: axis.title, showgrid: false },
      { title: `eigenvalue (symlog, linear below ${powerText(scale.linear)})`, tickvals: ticks.places, ticktext: ticks.texts, showgrid: false },
      { shapes: cursor(chosen, axis) }
    ),
  };
}

const powerText = (value) => `10<sup>${minus(Math.round(Math.log10(value)))}</sup>`;

const LOWEST_PART = 1e-10; // where rounding begins to matter

/** The densities on training and generalization data, with nodes and extremes. */
export function densityFigure(record, theme) {
  const drawn = [["spectrum", "training", theme.training, "solid"], ["generalization", "generalization", theme.generalization, "dash"]]
    .map(([field, label, colour, dash]) => ({ spectrum: spectrumOf(record, field), label, colour, dash }))
    .filter(({ spectrum }) => spectrum !== null)
    .map((one) => ({ ...one, ...density(one.spectrum) }));
  const [, top] = extent(drawn.flatMap(({ values }) => values));
  const [lowest] = extent(drawn.flatMap(({ spectrum, grid, values }) => peaks(spectrum, grid, values)));
  const bottom = Math.max(lowest / 100, top * LOWEST_PART);
  const decades = Math.log10(top / bottom);
  return {
    data: drawn.flatMap((one, index) => curvesOfDensity(one, bottom * 10 ** (decades * (0.02 + 0.035 * index)), index === 0, bottom)),
    layout: layoutOf(
      theme, { title: "Hessian eigenvalue (loss / parameter²)" },
      { title: "spectral density", type: "log", range: [Math.log10(bottom), Math.log10(top * 3)], exponentformat: "power", nticks: 7 },
      { shapes: drawn.flatMap(({ spectrum, colour, dash }) => extremes(spectrum, colour, dash)) }
    ),
  };
}

function curvesOfDensity({ spectrum, label, colour, dash, grid, values }, rug, filled, bottom) {
  const ends = indexed(`${label}: λ_min ${short(spectrum.lambda_min)}, λ_max ${short(spectrum.lambda_max)}`);
  return [
    {
      x: grid, y: values.map((v) => Math.max(v, bottom / 10)), mode: "lines", name: ends, line: { color: colour, width: 1.6, dash },
      fill: filled ? "tozeroy" : "none", fillcolor: faint(colour, 0.15), meta: { density: label },
      hovertemplate: `${label}<br>λ = %{x:.4g}<br>density %{y:.3g}<extra></extra>`,
    },
    {
      x: spectrum.nodes, y: spectrum.nodes.map(() => rug), mode: "markers", name: `nodes, ${label}`, showlegend: false, meta: { nodes: label },
      marker: { symbol: "line-ns-open", size: 8, color: colour, line: { width: 1 } }, customdata: spectrum.weights,
      hovertemplate: `node %{x:.4g}<br>weight %{customdata:.3g}<extra></extra>`,
    },
  ];
}

const short = (value) => minus(Number(value.toPrecision(3)));

function peaks(spectrum, grid, values) {
  const at = new Set(spectrum.nodes);
  return finite(values.filter((value, index) => at.has(grid[index]) && value > 0));
}

function extremes(spectrum, colour, dash) {
  return [spectrum.lambda_min, spectrum.lambda_max].map((value) => ({
    type: "line", yref: "paper", y0: 0, y1: 1, x0: value, x1: value, line: { color: colour, width: 1, dash: dash === "solid" ? "dot" : dash },
  }));
}

export function layersFigure(run, theme, quantity, chosen) {
  const axis = axisOf([run]);
  const { names, rows } = layerMap(run, quantity);
  const [title, logarithmic] = LAYER_QUANTITIES[quantity];
  const shown = logarithmic ? rows.map((row) => row.map((v) => (v > 0 ? Math.log10(v) : null))) : rows;
  const short = (name) => literal(name.length <= 26 ? name : `…${name.slice(-25)}`);
  return {
    data: [
      {
        type: "heatmap", x: places(run, axis), y: names.map((_, index) => index), z: shown, colorscale: LOW_TO_HIGH, hoverongaps: false,
        colorbar: { title: { text: indexed(logarithmic ? `log_10 ${title}` : title), side: "right" }, thickness: 12, outlinewidth: 0 },
        customdata: rows.map((row, index) => row.map((value) => [literal(names[index]), value])),
        hovertemplate: `%{customdata[0]}<br>${axis.short} %{x}<br>${indexed(title)} = %{customdata[1]:.4g}<extra></extra>`,
      },
    ],
    layout: layoutOf(
      theme, { title: axis.title, showgrid: false },
      { title: "layer", automargin: true, autorange: "reversed", tickvals: names.map((_, index) => index), ticktext: names.map(short), showgrid: false },
      { shapes: cursor(chosen, axis) }
    ),
  };
}
