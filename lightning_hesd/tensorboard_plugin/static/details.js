/** Figures of one run, as plain {data, layout} for Plotly. */

import { axisOf } from "./axis.js";
import { indexed, layoutOf, literal, minus } from "./base.js";
import {
  beyond, column, density, densityMap, extent, finite, interval, layerMap, negativeCount, ofSpectrum, parabola, quantitiesOf, scaleOf,
  scalarOf, spectrumOf, symlogTicks,
} from "./data.js";
import { number } from "./dom.js";
import { LOW_TO_HIGH, faint } from "./theme.js";

/** Return the line at the chosen record: white on black, to be seen on every color of a heat map. */
export function cursor(record, axis) {
  if (record === null) return [];
  const line = { type: "line", yref: "paper", x0: record[axis.key], x1: record[axis.key], y0: 0, y1: 1 };
  return [
    { ...line, name: "chosen", line: { color: "rgba(0, 0, 0, 0.6)", width: 3 } },
    { ...line, name: "chosen, inner", line: { color: "#ffffff", width: 1.2, dash: "dash" } },
  ];
}

/** Return positions for columns of a heat map. */
const columnsAt = (run, axis) => run.records.map((record) => record[axis.key]);

export function mapFigure(run, theme, field, chosen, axis = axisOf([run])) {
  const { scale, centers, rows } = densityMap(run, field);
  const x = columnsAt(run, axis);
  const ticks = symlogTicks(scale);
  const edge = (key) => ({
    x, y: column(run, ofSpectrum(key, field)).map((v) => (v === null ? null : scale.to(v))), mode: "lines", showlegend: false,
    line: { color: "#ffffff", width: 1.4 }, hoverinfo: "skip",
  });
  const eigenvalues = centers.map((place) => scale.back(place));
  return {
    data: [
      {
        type: "heatmap", x, y: centers, z: rows, colorscale: LOW_TO_HIGH, zmin: -6, zmax: 0, hoverongaps: false,
        colorbar: { title: { text: "log<sub>10</sub> mass", side: "right" }, thickness: 12, outlinewidth: 0 },
        customdata: eigenvalues.map((value) => new Array(x.length).fill(value)),
        hovertemplate: `${axis.short} %{x}<br>λ ≈ %{customdata:.3g}<br>log₁₀ mass %{z:.2f}<extra></extra>`,
      },
      edge("lambda_max"), edge("lambda_min"),
    ],
    layout: layoutOf(
      theme, { ...axis.layout, showgrid: false },
      { title: `eigenvalue (symlog, linear below ${powerText(scale.linear)})`, tickvals: ticks.places, ticktext: ticks.texts, showgrid: false },
      { shapes: cursor(chosen, axis) }
    ),
  };
}

const powerText = (value) => `10<sup>${minus(Math.round(Math.log10(value)))}</sup>`;

const LOWEST_PART = 1e-10; // where rounding begins to matter

/** Return the spectra of a record that are drawn, and how. */
function drawnOf(record, theme) {
  return [["spectrum", "training", theme.training, "solid"], ["generalization", "generalization", theme.generalization, "dash"]]
    .map(([field, label, color, dash]) => ({ spectrum: spectrumOf(record, field), label, color, dash }))
    .filter(({ spectrum }) => spectrum !== null);
}

/** The densities on training and generalization data, with nodes and extremes. */
export function densityFigure(record, theme) {
  const drawn = drawnOf(record, theme).map((one) => ({ ...one, ...density(one.spectrum) }));
  const [, top] = extent(drawn.flatMap(({ values }) => values));
  const [lowest] = extent(drawn.flatMap(({ spectrum, grid, values }) => peaks(spectrum, grid, values)));
  const bottom = Math.max(lowest / 100, top * LOWEST_PART);
  const decades = Math.log10(top / bottom);
  return {
    data: drawn.flatMap((one, index) => curvesOfDensity(one, bottom * 10 ** (decades * (0.02 + 0.035 * index)), index === 0, bottom)),
    layout: layoutOf(
      theme, { title: "Hessian eigenvalue (loss / parameter²)" },
      { title: "spectral density", type: "log", range: [Math.log10(bottom), Math.log10(top * 3)], exponentformat: "power", nticks: 7 },
      { shapes: drawn.flatMap(({ spectrum, color, dash }) => extremes(spectrum, color, dash)) }
    ),
  };
}

function curvesOfDensity({ spectrum, label, color, dash, grid, values }, rug, filled, bottom) {
  const ends = indexed(`${label}: λ_min ${short(spectrum.lambda_min)}, λ_max ${short(spectrum.lambda_max)}`);
  return [
    {
      x: grid, y: values.map((v) => Math.max(v, bottom / 10)), mode: "lines", name: ends, line: { color: color, width: 1.6, dash },
      fill: filled ? "tozeroy" : "none", fillcolor: faint(color, 0.15), meta: { density: label },
      hovertemplate: `${label}<br>λ = %{x:.4g}<br>density %{y:.3g}<extra></extra>`,
    },
    {
      x: spectrum.nodes, y: spectrum.nodes.map(() => rug), mode: "markers", name: `nodes, ${label}`, showlegend: false, meta: { nodes: label },
      marker: { symbol: "line-ns-open", size: 8, color: color, line: { width: 1 } }, customdata: spectrum.weights,
      hovertemplate: `node %{x:.4g}<br>weight %{customdata:.3g}<extra></extra>`,
    },
  ];
}

const short = (value) => minus(Number(value.toPrecision(3)));

function peaks(spectrum, grid, values) {
  const at = new Set(spectrum.nodes);
  return finite(values.filter((value, index) => at.has(grid[index]) && value > 0));
}

function extremes(spectrum, color, dash) {
  return [spectrum.lambda_min, spectrum.lambda_max].map((value) => ({
    type: "line", yref: "paper", y0: 0, y1: 1, x0: value, x1: value, line: { color: color, width: 1, dash: dash === "solid" ? "dot" : dash },
  }));
}

// Numbers of eigenvalues ---------------------------------------------------------------------------------------------

const FINEST = 1e-5; // thresholds below this share of the largest are drawn on a linear scale
const BELOW_ONE = 0.6; // lower end of the axis of numbers, on which zero has no place

/** The numbers of eigenvalues beyond thresholds, with the bands that they are within. */
export function cumulativeFigure(record, theme) {
  const drawn = drawnOf(record, theme).filter(({ spectrum }) => spectrum.cumulative_band);
  const scale = scaleOf(drawn.map(({ spectrum }) => extent(spectrum.cumulative_band.points)), FINEST);
  const { low, high } = scale;
  const ticks = symlogTicks(scale);
  const most = Math.max(...drawn.map(({ spectrum }) => spectrum.dimension));
  return {
    data: [...drawn.map((one) => bandOfNumbers(one, scale)), ...drawn.map((one) => curveOfNumbers(one, scale))],
    layout: layoutOf(
      theme, { title: `threshold (symlog, linear below ${powerText(scale.linear)})`, range: [scale.to(low) - 0.15, scale.to(high) + 0.15],
        tickvals: ticks.places, ticktext: ticks.texts },
      { title: "number of eigenvalues", type: "log", range: [Math.log10(BELOW_ONE), Math.log10(most * 1.5)], exponentformat: "power", dtick: 1 },
      { shapes: [{ type: "line", yref: "paper", y0: 0, y1: 1, x0: 0, x1: 0, line: { color: theme.muted, width: 1 } }] }
    ),
  };
}

/** Return the sides of `beyond` with places on the scale, without one that is zero only. */
function sidesOf(spectrum, scale) {
  const [negative, positive] = beyond(spectrum).map((side) => side.map((one) => ({ ...one, place: scale.to(one.threshold) })));
  return negative.length > 1 ? [negative, positive] : [positive];
}

const legible = (value) => Math.max(value, BELOW_ONE);

function bandOfNumbers({ spectrum, label, color }, scale) {
  const steps = (side, key) => side.flatMap((one, index) => [[one.place, legible(one[key])], [(side[index + 1] ?? one).place, legible(one[key])]]);
  const corners = sidesOf(spectrum, scale).flatMap((side) => [...steps(side, "high"), ...steps(side, "low").toReversed(), [null, null]]);
  return {
    x: corners.map(([place]) => place), y: corners.map(([, value]) => value), fill: "toself", mode: "lines", line: { width: 0 },
    fillcolor: faint(color, 0.25), hoverinfo: "skip", showlegend: false, meta: { band: label },
  };
}

function curveOfNumbers({ spectrum, label, color, dash }, scale) {
  const shown = sidesOf(spectrum, scale).flatMap((side) => [...side, { place: null, found: null }]);
  const count = negativeCount(spectrum);
  return {
    x: shown.map(({ place }) => place), y: shown.map(({ found }) => found === null ? null : legible(found)), mode: "lines",
    line: { color: color, width: 1.6, dash, shape: "hv" }, name: count === null ? label : `${label}: ${count} negative`, meta: { numbers: label },
    text: shown.map(({ side, threshold, low, high }) => `${side} ${number(threshold)}: ${interval(low, high)}`),
    customdata: shown.map(({ threshold }) => threshold), hovertemplate: `${label}<br>%{text} eigenvalues<extra></extra>`,
  };
}

// Loss along eigenvectors --------------------------------------------------------------------------------------------

const MARGIN_OF_LOSSES = 0.15; // above and below them; parabolas may leave the figure

/** The loss along the eigenvectors of the extreme eigenvalues, and the parabolas that it follows near zero (dashed). */
export function lossesAlongFigure(spectrum, theme) {
  const lines = [["lambda_min", theme.generalization, "circle"], ["lambda_max", theme.training, "square"]]
    .map(([key, color, symbol]) => ({ key, color, symbol, eigenvalue: spectrum[key], line: spectrum.losses_along[key] }));
  const [low, high] = extent(lines.flatMap(({ line }) => line.losses));
  const margin = MARGIN_OF_LOSSES * (high - low) || 1;
  const data = lines.flatMap(({ key, color, symbol, eigenvalue, line }) => {
    const title = indexed(key.replace("lambda", "λ"));
    const farthest = line.distances.at(-1);
    const shared = { x: line.distances.map((t) => t / farthest), meta: { along: key } };
    return [
      {
        ...shared, y: line.losses, mode: "lines+markers", line: { color: color, width: 1.8 }, marker: { symbol, size: 5 },
        name: `${title} = ${short(eigenvalue)}, t ≤ ${short(farthest)}`, customdata: line.distances,
        hovertemplate: `along ${title}<br>t = %{customdata:.3g}<br>loss = %{y:.4g}<extra></extra>`,
      },
      { ...shared, y: parabola(line, eigenvalue), mode: "lines", line: { color: color, width: 1.2, dash: "dash" }, hoverinfo: "skip", showlegend: false },
    ];
  });
  return {
    data,
    layout: layoutOf(theme, { title: "distance t / farthest" }, { title: "mean loss", range: [low - margin, high + margin], exponentformat: "power", automargin: true }),
  };
}

// Layers -------------------------------------------------------------------------------------------------------------

/** What is known of a layer in one record. Plotly reads the fields of the one that is pointed at; thousands are drawn. */
class Layer {
  constructor(lists, place, scalars) {
    this.lists = lists;
    this.place = place;
    this.scalars = scalars;
  }

  of(key) {
    return this.lists[key]?.[this.place] ?? null;
  }

  get name() {
    return literal(this.of("name"));
  }

  /** All as lines of a text: the scalars, then the rest. */
  get details() {
    const lines = this.scalars.filter(({ key }) => Number.isFinite(this.of(key))).map(({ key, title }) => {
      const error = key === "trace" && this.of("trace_error") ? ` ± ${number(this.of("trace_error"), 2)}` : "";
      return `${indexed(title)} = ${number(this.of(key))}${error}`;
    });
    for (const key of ["lambda_max", "lambda_min"])
      if (this.of(`${key}_low`) !== null) lines.push(`${indexed(key.replace("lambda", "λ"))} between ${number(this.of(`${key}_low`))} and ${number(this.of(`${key}_high`))}`);
    if (Number.isFinite(this.of("dimension"))) lines.push(`${this.of("dimension")} parameters`);
    return lines.join("<br>");
  }
}

/** Return the ends of colors for shares of a sum: those far beyond 0 and 1, where the sum is close to zero, must not take all. */
function endsOfShares(values) {
  const [low, high] = extent(values);
  return { zmin: Math.max(low, 0), zmax: Math.min(high, 1) };
}

export function layersFigure(run, theme, quantity, chosen, axis = axisOf([run])) {
  const scalar = scalarOf(run, "layers", quantity);
  const { title, is_logarithmic: logarithmic } = scalar;
  const scalars = [scalar, ...quantitiesOf(run).filter((other) => other !== scalar)]; // the shown one first
  const { names, rows: places } = layerMap(run);
  const layers = places.map((row) => row.map((place, index) => place === null ? null : new Layer(run.records[index].layers, place, scalars)));
  const rows = layers.map((row) => row.map((layer) => layer?.of(quantity) ?? null));
  const shown = logarithmic ? rows.map((row) => row.map((v) => (v > 0 ? Math.log10(v) : null))) : rows;
  const short = (name) => literal(name.length <= 26 ? name : `…${name.slice(-25)}`);
  return {
    data: [
      {
        type: "heatmap", x: columnsAt(run, axis), y: names.map((_, index) => index), z: shown, colorscale: LOW_TO_HIGH, hoverongaps: false,
        ...(quantity === "trace_share" ? endsOfShares(rows.flat()) : {}),
        colorbar: { title: { text: indexed(logarithmic ? `log_10 ${title}` : title), side: "right" }, thickness: 12, outlinewidth: 0 },
        customdata: layers,
        hovertemplate: `%{customdata.name}<br>${axis.short} %{x}<br>%{customdata.details}<extra></extra>`, hoverlabel: { align: "left" },
      },
    ],
    layout: layoutOf(
      theme, { ...axis.layout, showgrid: false },
      { title: "layer", automargin: true, autorange: "reversed", tickvals: names.map((_, index) => index), ticktext: names.map(short), showgrid: false },
      { shapes: cursor(chosen, axis) }
    ),
  };
}
