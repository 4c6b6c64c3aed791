/** Samples of lines and marks beside names: the legends of figures, outside of them. */

import { element } from "./dom.js";
import { colorOf, symbolOf } from "./theme.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 26;
const DASHES = { solid: "", dash: "7 3", dot: "2 3", dashdot: "7 3 2 3", longdash: "11 3" };

/** Outlines of Plotly's symbols, around zero and within 5 pixels of it. */
const OUTLINES = {
  circle: "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0z",
  square: "M-4,-4h8v8h-8z",
  diamond: "M0,-5.2L5.2,0L0,5.2L-5.2,0z",
  "triangle-up": "M0,-5L5,4H-5z",
  "triangle-down": "M0,5L5,-4H-5z",
  cross: "M-1.7,-5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
  x: "M0,-2.4L2.8,-5.2L5.2,-2.8L2.4,0L5.2,2.8L2.8,5.2L0,2.4L-2.8,5.2L-5.2,2.8L-2.4,0L-5.2,-2.8L-2.8,-5.2z",
  "triangle-left": "M-5,0L4,-5V5z",
  "triangle-right": "M5,0L-4,-5V5z",
  hourglass: "M-4.5,-4.5H4.5L-4.5,4.5H4.5z",
  star: "M0,-6L1.6,-2L5.8,-1.9L2.5,0.8L3.6,4.9L0,2.5L-3.6,4.9L-2.5,0.8L-5.8,-1.9L-1.6,-2z",
  "line-ns-open": "M0,-5V5",
};

function drawn(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  made.append(...children);
  return made;
}

/** Draw a sample of a line in a dash, of a mark, or of both; what is null is left out. */
export function swatch({ color, dash = null, symbol = null, fill = color }) {
  const line = dash === null ? [] : [drawn("line", { x1: 0, x2: WIDTH, y1: 7, y2: 7, stroke: color, "stroke-width": 2, "stroke-dasharray": DASHES[dash] ?? "" })];
  const place = { transform: `translate(${WIDTH / 2} 7)`, fill, stroke: color, "stroke-width": 1.2 };
  const mark = symbol === null ? [] : [drawn("path", { d: OUTLINES[symbol] ?? OUTLINES.circle, ...place })];
  return drawn("svg", { class: "swatch", width: WIDTH, height: 14, viewBox: `0 0 ${WIDTH} 14`, "aria-hidden": "true" }, ...line, ...mark);
}

/** Draw the sample of a run or group, in its color and with its mark. */
export const swatchOf = (theme, index) => swatch({ color: colorOf(theme, index), dash: "solid", symbol: symbolOf(index) });

/** Return the legend of a figure: its curves with a name, without those of runs and spectra, which have a legend elsewhere. */
export function keysOf(data) {
  const named = data.filter(({ name, showlegend, mode, meta }) => name && showlegend !== false && mode && !meta?.run && !meta?.field);
  return named.map(({ mode, line, marker, name }) => {
    const [hasLine, hasMarks] = ["lines", "markers"].map((part) => mode.includes(part));
    const sample = swatch({
      color: hasLine ? line.color : (marker.line?.color ?? marker.color), dash: hasLine ? (line.dash ?? "solid") : null,
      symbol: hasMarks ? marker.symbol : null, fill: hasMarks ? marker.color : null,
    });
    return element("span", { class: "key" }, sample, element("span", {}, ...nodesOf(name)));
  });
}

const ENTITIES = { "&lt;": "<", "&gt;": ">", "&amp;": "&", "%&#123;": "%{" };

/** Return a text for Plotly, of `literal` and `indexed`, as nodes: subscripts and what is escaped. */
function nodesOf(text) {
  const plain = (part) => part.replace(/&lt;|&gt;|&amp;|%&#123;/g, (entity) => ENTITIES[entity]);
  return text.split(/<sub>(.*?)<\/sub>/).map((part, index) => (index % 2 ? element("sub", {}, plain(part)) : plain(part)));
}
