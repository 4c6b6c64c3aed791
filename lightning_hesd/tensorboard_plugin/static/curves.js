/** Charts of runs, or of groups of runs, over training, as plain {data, layout, lines} for Plotly. */

import { when } from "./axis.js";
import { horizontal, indexed, layoutOf, literal, logTicks, note, ratios } from "./base.js";
import { extent } from "./data.js";
import { meanOf } from "./grouping.js";
import { colorOf, faint, symbolOf } from "./theme.js";
import { errorBars } from "./uncertainty.js";

const FEW = 80; // records up to which each gets a mark
const SEEN = 12; // marks of a longer curve
const CROWD = 12; // lines from which on each is thin, with few marks

/**
 * Draw a chart.
 * @param {Chart} chart See charts.js.
 * @param {{members: Object[], axis: Object, theme: Object, logarithmic: boolean, chosen: ?Object}} view `members` are runs, or
 *   groups, which have `runs`; `chosen` is the record that is shown in detail.
 * @returns {{data: Object[], layout: Object, lines: Line[]}}
 */
export function chartFigure(chart, view) {
  const { axis, theme, logarithmic, members, chosen } = view;
  const show = shownBy(chart, logarithmic);
  const lines = members.flatMap((member) => chart.quantities.map((quantity) => lineOf(member, quantity, axis)));
  const values = lines.flatMap(({ y, low, high }) => [y, low ?? [], high ?? []].flat()).map(show);
  const range = chart.rangeOf?.(lines, logarithmic) ?? rangeOf([...values, ...chart.thresholds.map(({ value }) => show(value))], logarithmic);
  const floor = logarithmic ? 10 ** Math.min(...range) : null; // what has no place on the axis reaches its end
  const opacity = 0.28 / Math.sqrt(members.length);
  const runs = members.filter((member) => !member.runs);
  const picks = runs.flatMap((run) => chart.quantities.flatMap((quantity) => picksOf(run, quantity, axis, theme, show, runs.length > CROWD)));
  return {
    data: [
      ...lines.filter(({ low }) => low).map((line) => bandOf(line, theme, (v) => (v === null ? null : (show(v) ?? floor)), opacity)),
      ...lines.map((line) => curveOf(line, theme, show, members.length > CROWD)),
      ...picks, ...legendOf(chart, view),
    ],
    layout: layoutOf(theme, { ...axis.layout, range: axis.range },
      { title: chart.axisTitle(logarithmic), isName: chart.isName, type: logarithmic ? "log" : "linear", range, ...(logarithmic ? logTicksOf(chart, range) : {}) },
      {
        hovermode: "x", hoverdistance: -1, showlegend: false,
        shapes: [...shapesOf(chart, theme, range, logarithmic), ...chosenLine(chosen, axis, theme)],
        annotations: chart.thresholds.map(({ value, text }) => note(text, logarithmic ? Math.log10(show(value)) : value)),
      }),
    lines,
  };
}

/** Return the line at the chosen record. */
export function chosenLine(record, axis, theme) {
  if (record === null) return [];
  const x = record[axis.key];
  return [{ name: "chosen", type: "line", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line: { color: theme.text, width: 1.2, dash: "dash" } }];
}

/** Return the function that places values on the axis: null for those that a logarithmic one has no place for. */
function shownBy({ isNegative }, logarithmic) {
  const sign = isNegative ? -1 : 1;
  return (value) => (!logarithmic || value === null ? value : sign * value > 0 ? sign * value : null);
}

function rangeOf(values, logarithmic) {
  const [low, high] = extent(values);
  if (logarithmic) return [Math.log10(low / 1.3), Math.log10(high * 1.3)];
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.06 || 1;
  return [low - margin, high + margin];
}

/** Return the ticks of a logarithmic axis; that of a negative quantity shows its absolute value, upside down. */
function logTicksOf({ isNegative }, range) {
  const [low, high] = extent(range.map((exponent) => 10 ** exponent));
  const ticks = high / low < 200 ? ratios(low, high) : logTicks([low, high]);
  if (!isNegative) return ticks;
  return { ...ticks, tickprefix: "−", ...(ticks.ticktext ? { ticktext: ticks.ticktext.map((text) => `−${text}`) } : {}) };
}

// Lines -------------------------------------------------------------------------------------------------------------

/**
 * A quantity of a run or of a group: `places` are steps or epochs, `low` and `high` the interval or null, `counts` the numbers of
 * runs, `records` those of a run.
 * @typedef {{key: string, name: string, color: number, quantity: Object, x: number[], y: (?number)[], low: ?(?number)[],
 *   high: ?(?number)[], records: ?Object[], texts: string[], counts: ?number[], size: number}} Line
 */
function lineOf(member, quantity, axis) {
  const named = { key: member.key, name: member.run, color: member.color, quantity, size: member.runs?.length ?? 1 };
  if (member.runs) {
    const found = meanOf(member, axis, quantity.valuesOf);
    const texts = found.places.map((place) => (axis.says === "epoch" ? (place < 0 ? "start" : `epoch ${place}`) : `step ${place}`));
    return { ...named, ...found, records: null, texts };
  }
  const [low, high] = quantity.boundsOf?.(member) ?? [null, null];
  const { records } = member;
  const texts = records.map((record) => when(record, axis));
  return { ...named, x: records.map((r) => r[axis.key]), y: quantity.valuesOf(member), low, high, records, texts, counts: null, run: member };
}

/** Draw a line: in the color and with the mark of its run or group, in the dash of the quantity. */
function curveOf({ key, name, color: index, quantity, x, y, records, texts, run }, theme, show, isCrowded) {
  const color = colorOf(theme, index);
  const candidates = quantity.candidatesOf && run ? quantity.candidatesOf(run) : null;
  const isFilled = (record) => !candidates?.size || candidates.has(record.global_step);
  const few = x.length <= FEW;
  return {
    x, y: y.map(show), name: literal(name), legendgroup: key, showlegend: false, mode: "lines+markers",
    line: { color: color, width: isCrowded ? 1.1 : 1.8, dash: quantity.dash },
    marker: {
      symbol: symbolOf(index), size: isCrowded ? 5.5 : 6.5, line: { color: color, width: 1.5 }, maxdisplayed: few ? 0 : isCrowded ? SEEN / 2 : SEEN,
      color: few && records ? records.map((record) => (isFilled(record) ? color : theme.paper)) : color,
    },
    ...(quantity.hasErrors && run ? errorBars(run.records, show, color) : {}),
    customdata: texts.map((text, place) => [text, records?.[place].global_step ?? null]), hoverinfo: "none",
    meta: { key, quantity: quantity.label },
  };
}

function bandOf({ key, color, x, low, high }, theme, place, opacity) {
  const inside = x.map((_, index) => index).filter((index) => place(low[index]) !== null && place(high[index]) !== null);
  const at = inside.map((index) => x[index]);
  const side = (ends) => inside.map((index) => place(ends[index]));
  return {
    x: [...at, ...at.toReversed()], y: [...side(high), ...side(low).toReversed()], fill: "toself", mode: "lines", line: { width: 0 },
    fillcolor: faint(colorOf(theme, color), opacity), hoverinfo: "skip", showlegend: false, legendgroup: key, meta: { band: key },
  };
}

/** Return the rules of a run that rank by a scalar; of several checkpoint callbacks with one rule, the first. */
export const rulesBy = (run, scalar) =>
  run.rules.filter((rule, index, all) => rule.scalar === scalar && all.findIndex((one) => one.rule === rule.rule) === index);

/** Return marks at the picks of rules, and a pale underlay where there are too many candidates to mark each. */
function picksOf(run, { scalar, valuesOf }, axis, theme, show, isCrowded) {
  const [x, y] = [run.records.map((r) => r[axis.key]), valuesOf(run).map(show)];
  const color = colorOf(theme, run.color);
  const shared = { hoverinfo: "skip", showlegend: false, legendgroup: run.key };
  return (scalar ? rulesBy(run, scalar) : []).flatMap((rule) => {
    const candidates = new Set(rule.candidates);
    const at = run.records.findIndex((record) => record.global_step === rule.pick?.global_step);
    const underlay = {
      ...shared, x, y: y.map((value, index) => (candidates.has(run.records[index].global_step) ? value : null)), mode: "lines", connectgaps: false,
      line: { color: faint(color, 0.3), width: 9 },
    };
    const star = {
      ...shared, x: at < 0 ? [] : [x[at]], y: at < 0 ? [] : [y[at]], mode: "markers", name: `pick: ${literal(rule.title)}`,
      marker: { symbol: "star", size: isCrowded ? 10 : 15, color: color, line: { color: theme.text, width: 1 } }, meta: { key: run.key, pick: rule.rule },
    };
    return run.records.length > FEW && !isCrowded ? [underlay, star] : [star];
  });
}

// Legend and background -----------------------------------------------------------------------------------------------

/** Return the entries of the legend: the runs, which the page has in its list, and the meanings of marks and dashes. */
function legendOf({ quantities }, { members, theme }) {
  const entry = (name, more) => ({ x: [null], y: [null], name, hoverinfo: "skip", showlegend: true, ...more });
  const named = members.length < 2 ? [] : members.map(({ key, run, color }) =>
    entry(literal(run), {
      legendgroup: key, meta: { run: key }, mode: "lines+markers", line: { color: colorOf(theme, color), width: 1.8 }, marker: { symbol: symbolOf(color), size: 7 },
    }));
  const marked = (name, symbol, filled = true) => entry(indexed(name), {
    mode: "markers", marker: { symbol, size: symbol === "star" ? 12 : 7, color: filled ? theme.muted : theme.paper, line: { color: theme.muted, width: 1.5 } },
  });
  const dashes = quantities.length < 2 ? [] : quantities.map(({ label, dash }) => entry(indexed(label), { mode: "lines", line: { color: theme.muted, width: 1.8, dash } }));
  const runs = members.filter((member) => !member.runs);
  const rules = quantities.flatMap(({ scalar }) => runs.flatMap((run) => (scalar ? rulesBy(run, scalar) : [])));
  const hasCandidates = quantities.some(({ candidatesOf }) => candidatesOf && runs.some((run) => candidatesOf(run).size));
  const marks = hasCandidates ? [marked("candidate", "circle"), marked("not a candidate", "circle", false)] : [];
  const means = runs.length < members.length ? [entry("mean of a group; band: ± standard deviation", { mode: "lines", line: { color: theme.muted, width: 1.8 } })] : [];
  return [...named, ...means, ...dashes, ...marks, ...[...new Set(rules.map(({ title }) => title))].map((title) => marked(title, "star"))];
}

/** Return the thresholds, and what they separate. */
function shapesOf({ thresholds, sides, isNegative }, theme, range, logarithmic) {
  const place = (value) => (logarithmic && isNegative ? -value : value);
  const edge = (index) => (logarithmic ? 10 ** range[index] : range[index]);
  const shade = (y0, y1, fillcolor) => ({ type: "rect", layer: "below", xref: "paper", x0: 0, x1: 1, y0, y1, fillcolor, line: { width: 0 } });
  const shades = sides ? [shade(place(sides), edge(1), theme.positive), shade(edge(0), place(sides), theme.negative)] : [];
  return [...shades, ...thresholds.map(({ value, dash }) => horizontal(place(value), theme, dash))];
}
