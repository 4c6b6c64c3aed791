/** Figures of one run, as plain {data, layout} for Plotly. */

import { indexed, layoutOf, literal, minus } from "./base.js";
import {
  axisOf, column, density, densityMap, extent, finite, layerMap, ofSpectrum, scalarOf, spectrumOf, symlogTicks,
} from "./data.js";
import { LOW_TO_HIGH, faint } from "./theme.js";

/** Return the line at the chosen record: white on black, to be seen on every color of a heat map. */
export function cursor(record, axis) {
  if (record === null) return [];
  const line = { type: "line", yref: "paper", x0: record[axis.key], x1: record[axis.key], y0: 0, y1: 1 };
  return [
    { ...line, name: "chosen", line: { color: "rgba(0, 0, 0, 0.6)", width: 3 } },
    { ...line, line: { color: "#ffffff", width: 1.2, dash: "dash" } },
  ];
}

/** Return positions for columns of a heat map. */
const places = (run, axis) => run.records.map((record) => record[axis.key]);

export function mapFigure(run, theme, field, chosen) {
  const axis = axisOf([run]);
  const { scale, centers, rows } = densityMap(run, field);
  const x = places(run, axis);
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
    .map(([field, label, color, dash]) => ({ spectrum: spectrumOf(record, field), label, color, dash }))
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

export function layersFigure(run, theme, quantity, chosen) {
  const axis = axisOf([run]);
  const { names, rows } = layerMap(run, quantity);
  const { title, is_logarithmic: logarithmic } = scalarOf(run, "layers", quantity);
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
