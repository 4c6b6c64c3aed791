/** Figures of one run, as plain {data, layout} for Plotly. */

import { indexed, layoutOf, literal, short } from "./base.js";
import { SPECTRA, column, extent, interval, negativeCount, ofSpectrum, parabola, spectrumOf } from "./data.js";
import { beyond, densityMap, powerOfTen, scaleOf, symlogTicks } from "./distribution.js";
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

/** Return marks at the bottom of a heat map, on an axis from 0 to 1, where analyses failed; none: nothing to draw. */
export function failuresOf(run, axis, theme, yaxis) {
  const failed = run.records.filter((record) => !spectrumOf(record));
  if (!failed.length) return [];
  return [{
    x: failed.map((record) => record[axis.key]), y: failed.map(() => 0.04), yaxis, mode: "markers", name: "failed analysis", showlegend: true,
    marker: { symbol: "x", size: 9, color: theme.generalization, line: { color: theme.paper, width: 1 } }, meta: { failed: true },
    text: failed.map(({ error }) => literal(String(error ?? "no spectrum").split("\n")[0].slice(0, 120))),
    hovertemplate: `${axis.short} %{x}: the analysis failed<br>%{text}<extra></extra>`,
  }];
}

/** The axis of `failuresOf`, over that of the heat map. */
export const OF_FAILURES = { overlaying: "y", range: [0, 1], visible: false, fixedrange: true };

/** The heat map of the spectral density on the training data over the records. */
export function mapFigure(run, theme, chosen, axis) {
  const { scale, centers, rows } = densityMap(run);
  const x = run.records.map((record) => record[axis.key]); // columns reach halfway to their neighbors
  const ticks = symlogTicks(scale);
  const edge = (key) => ({
    x, y: column(run, ofSpectrum(key)).map((v) => (v === null ? null : scale.to(v))), mode: "lines", showlegend: false,
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
      edge("lambda_max"), edge("lambda_min"), ...failuresOf(run, axis, theme, "y2"),
    ],
    layout: layoutOf(
      theme, { ...axis.layout, showgrid: false },
      { title: `eigenvalue (symlog, linear below ${powerOfTen(scale.linear)})`, tickvals: ticks.places, ticktext: ticks.texts, showgrid: false },
      { shapes: cursor(chosen, axis), yaxis2: OF_FAILURES }
    ),
  };
}

// Numbers of eigenvalues ---------------------------------------------------------------------------------------------

const FINEST = 1e-5; // thresholds below this share of the largest are drawn on a linear scale
const BELOW_ONE = 0.6; // lower end of the axis of numbers, on which zero has no place

/** Return the spectra of a record that have a band of numbers, and how they are drawn. */
function drawnOf(record, theme) {
  return SPECTRA.slice(0, 2)
    .map(({ field, label, dash }) => ({ spectrum: spectrumOf(record, field), label, dash, color: field === "spectrum" ? theme.training : theme.generalization }))
    .filter(({ spectrum }) => spectrum?.cumulative_band);
}

/** The numbers of eigenvalues beyond thresholds, with the bands that they are within. */
export function cumulativeFigure(record, theme) {
  const drawn = drawnOf(record, theme);
  const scale = scaleOf(drawn.map(({ spectrum }) => extent(spectrum.cumulative_band.points)), FINEST);
  const { low, high } = scale;
  const ticks = symlogTicks(scale);
  const most = Math.max(...drawn.map(({ spectrum }) => spectrum.dimension));
  return {
    data: [...drawn.map((one) => bandOfNumbers(one, scale)), ...drawn.map((one) => curveOfNumbers(one, scale))],
    layout: layoutOf(
      theme, { title: `threshold (symlog, linear below ${powerOfTen(scale.linear)})`, range: [scale.to(low) - 0.15, scale.to(high) + 0.15],
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
