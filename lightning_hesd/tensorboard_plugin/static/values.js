/** The values of all runs at one epoch, beside the pointer. */

import { element, number, typeset } from "./dom.js";
import { swatchOf } from "./swatches.js";
import { intervalOf, withError, within } from "./uncertainty.js";

const IN_COLUMN = 18; // of a column
const SHIFT = 18; // pixels from the pointer
const NEAR = 0.03; // of the axis: how far from the pointer's time a record may be

export class ValueCard {
  constructor(place) {
    this.card = element("div", { id: "values", hidden: true, "aria-hidden": "true" }); // the data table has them, too
    place.append(this.card);
  }

  hide() {
    this.card.hidden = true;
  }

  /**
   * Show the values at a place of the axis.
   * @param {{chart: Object, lines: Object[], axis: Object, theme: Object}} figure
   * @param {number} x
   * @param {?string} nearest Key of the run that the pointer is nearest to.
   * @param {MouseEvent} pointer
   */
  show({ chart, lines, axis, theme }, x, nearest, pointer) {
    const reach = axis.kind === "time" ? NEAR * (axis.range[1] - axis.range[0]) : 0;
    const found = lines.map((line) => ({ line, index: indexAt(line, x, reach) }));
    const rows = rowsAt(found, chart.quantities);
    if (!rows.length) return this.hide();
    const missing = lines.length / chart.quantities.length - rows.length;
    const isNamed = (label) => (chart.isName ? [label] : typeset(label));
    const head = element("tr", {}, element("th", {}, ""), ...chart.quantities.map(({ label }) => element("th", {}, ...isNamed(label))));
    const body = rows.map((row) => rowOf(row, theme, row.key === nearest));
    const tables = Array.from({ length: Math.ceil(rows.length / IN_COLUMN) }, (_, part) =>
      element("table", {}, element("thead", {}, head.cloneNode(true)), element("tbody", {}, ...body.slice(part * IN_COLUMN, (part + 1) * IN_COLUMN))));
    const { line, index } = found.find(({ index: place }) => place >= 0);
    this.card.replaceChildren(
      element("p", {}, axis.kind === "time" ? `${axis.title}: ${number(x, 3)}` : line.texts[index]),
      element("div", { class: "tables" }, ...tables),
      ...(missing > 0 ? [element("p", { class: "why" }, `${missing} without a record here`)] : [])
    );
    this.card.hidden = false;
    this.moveTo(pointer);
  }

  /** Put the card beside the pointer, within the window. */
  moveTo({ clientX, clientY }) {
    const { offsetWidth: width, offsetHeight: height } = this.card;
    const left = clientX + SHIFT + width < window.innerWidth ? clientX + SHIFT : Math.max(clientX - SHIFT - width, 4);
    const top = Math.max(Math.min(clientY - height / 3, window.innerHeight - height - 8), 4);
    Object.assign(this.card.style, { left: `${left}px`, top: `${top}px` });
  }
}

/** Return the index of a line's value at a place, or the nearest one within reach; -1: none. */
function indexAt({ x }, place, reach) {
  if (!reach) return x.indexOf(place);
  let best = -1;
  x.forEach((value, index) => {
    if (Math.abs(value - place) <= Math.min(reach, best < 0 ? Infinity : Math.abs(x[best] - place))) best = index;
  });
  return best;
}

/** Return a row for each run or group, the largest value of the first quantity first. */
function rowsAt(found, quantities) {
  const rows = new Map();
  for (const { line, index } of found) {
    if (index < 0) continue;
    if (!rows.has(line.key)) rows.set(line.key, { key: line.key, line, step: line.records?.[index].global_step ?? null, values: quantities.map(() => null) });
    rows.get(line.key).values[quantities.indexOf(line.quantity)] = valueAt(line, index);
  }
  const size = ({ values }) => values[0]?.value ?? -Infinity;
  return [...rows.values()].sort((a, b) => size(b) - size(a));
}

function valueAt({ y, low, high, counts, size }, index) {
  if (y[index] === null || y[index] === undefined) return null;
  const bounds = low && low[index] !== null && high[index] !== null ? [low[index], high[index]] : null;
  return { value: y[index], bounds, count: counts ? [counts[index], size] : null };
}

function rowOf({ line, step, values }, theme, isNearest) {
  const picked = (line.run?.rules ?? []).filter((rule) => rule.pick?.global_step === step && rule.scalar === line.quantity.scalar).map(({ title }) => title);
  const name = [swatchOf(theme, line.color), element("span", {}, line.name), ...(picked.length ? [element("span", { title: picked.join(", ") }, " ★")] : [])];
  return element("tr", isNearest ? { class: "nearest" } : {}, element("th", { scope: "row" }, ...name), ...values.map((value) => element("td", { class: "number" }, ...inCell(value))));
}

/** Write a value with its interval; that of a group with its standard deviation, and how many runs have it. */
function inCell(found) {
  if (found === null) return ["–"];
  const { value, bounds, count } = found;
  if (count) return [withError(value, bounds && (bounds[1] - bounds[0]) / 2), element("small", {}, ` (${count[0]} of ${count[1]})`)];
  return bounds ? [within(value, ...bounds), element("small", {}, ` ${intervalOf(...bounds)}`)] : [number(value)];
}
