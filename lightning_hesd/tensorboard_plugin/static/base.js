/** Layout, ticks and texts that figures share. */

import { extent } from "./data.js";

/** Return a text escaped for Plotly, which would interpret markup in it. */
export function literal(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll("%{", "%&#123;");
}

/** Return a text of this package with its indices as subscripts. */
export const indexed = (text) => text.replace(/_([A-Za-z0-9]+)/g, "<sub>$1</sub>");

const MARGIN = { l: 72, r: 52, t: 10, b: 52 };

/** Return the layout of a figure with these two axes. */
export function layoutOf(theme, x, y, more = {}) {
  // Margins are fixed, since Plotly would take a third of the drawing time to find them.
  const axis = ({ isName = false, ...given }) => ({
    automargin: false, gridcolor: theme.grid, linecolor: theme.muted, zeroline: false, ticks: "outside", tickcolor: theme.grid,
    ...given, title: { text: isName ? literal(given.title) : indexed(given.title), standoff: 8 }, // a name has no indices
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

/** Return the ticks of a logarithmic axis: powers of ten on a wide axis, multiples of them on a narrow one. */
export function logTicks(values) {
  const [low, high] = extent(values);
  if (high / low < 30) return ratios(low / 1.2, high * 1.2);
  return { exponentformat: "power", dtick: Math.ceil(Math.log10(high / low) / 8), minor: { ticks: "outside", ticklen: 3 } };
}

/** Return ticks at some multiples of the powers of ten. */
export function ratios(low, high) {
  const multiples = high / low > 200 ? [1] : high / low > 12 ? [1, 2, 5] : [1, 1.5, 2, 3, 5, 7];
  const tickvals = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
    for (const multiple of multiples) tickvals.push(Number((multiple * 10 ** e).toPrecision(2)));
  return { tickvals, ticktext: tickvals.map(String) };
}

export const minus = (value) => String(value).replaceAll("-", "−");

/** Write a number with three digits. */
export const short = (value) => minus(Number(value.toPrecision(3)));

export function horizontal(value, theme, dash = "dash") {
  return { type: "line", xref: "paper", x0: 0, x1: 1, y0: value, y1: value, line: { color: theme.text, width: 1.2, dash } };
}

/** Return a text in the right margin. */
export const note = (text, y) => ({
  xref: "paper", x: 1, xanchor: "left", xshift: 4, y, yanchor: "middle", align: "left", text: indexed(text), showarrow: false,
  font: { size: 11 },
});
