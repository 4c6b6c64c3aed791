/** The heat map of layers, as plain {data, layout} for Plotly. */

import { indexed, layoutOf, literal } from "./base.js";
import { extent, finite, layerMap, quantitiesOf, scalarOf } from "./data.js";
import { OF_FAILURES, cursor, failuresOf } from "./details.js";
import { keepFocus, menu, number } from "./dom.js";
import { LOW_TO_HIGH } from "./theme.js";
import { intervalOf, withError } from "./uncertainty.js";

const WIDE_RANGE = 20; // largest over smallest value from which on colors are logarithmic

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
      const isTrace = key === "trace" && this.of("trace_error") !== null;
      return `${indexed(title)} = ${isTrace ? withError(this.of(key), this.of("trace_error")) : number(this.of(key))}`;
    });
    for (const key of ["lambda_max", "lambda_min"])
      if (this.of(`${key}_low`) !== null) lines.push(`${indexed(key.replace("lambda", "λ"))} in ${intervalOf(this.of(`${key}_low`), this.of(`${key}_high`))}`);
    if (Number.isFinite(this.of("dimension"))) lines.push(`${this.of("dimension")} parameters`);
    return lines.join("<br>");
  }
}

/** Return what all names begin with, whole parts between dots only. */
function commonPrefix(names) {
  const parts = names.map((name) => name.split(".").slice(0, -1));
  const count = names.length < 2 ? 0 : parts[0].findIndex((part, i) => parts.some((other) => other[i] !== part));
  const shared = count < 0 ? parts[0] : parts[0].slice(0, count);
  return shared.length ? `${shared.join(".")}.` : "";
}

/** Return the scale of colors that fits values: logarithmic for positive ones of several sizes, else a root, which keeps signs. */
function colorsOf(values, key) {
  const [low, high] = extent(values);
  if (low > 0 && high / low > WIDE_RANGE) return { title: "log", to: Math.log10, back: (place) => 10 ** place, low, high };
  // Shares far beyond 0 and 1, where the sum is close to zero, must not take all colors.
  const ends = key === "trace_share" ? [Math.max(low, 0), Math.min(high, 1)] : [low, high];
  return { title: "root", to: (v) => Math.sign(v) * Math.sqrt(Math.abs(v)), back: (place) => Math.sign(place) * place ** 2, low: ends[0], high: ends[1] };
}

/** Return the ticks of the color bar, with values of the quantity. */
function barOf({ title, to, back, low, high }, name) {
  const places = Array.from({ length: 5 }, (_, i) => to(low) + ((to(high) - to(low)) * i) / 4);
  return {
    title: { text: `${indexed(name)} (${title})`, side: "right" }, thickness: 12, outlinewidth: 0,
    tickvals: places, ticktext: places.map((place) => number(back(place), 2)),
  };
}

/** Return the positions of layers in the order of the rows: of the network, or by the value at the chosen state, or else the last one. */
function orderOf(rows, run, chosen, order) {
  const places = rows.map((_, place) => place);
  if (order !== "value") return places;
  const column = run.records.indexOf(chosen);
  const value = (place) => rows[place][column] ?? finite(rows[place]).at(-1) ?? -Infinity;
  return places.sort((a, b) => value(b) - value(a));
}

const clip = (name) => literal(name.length <= 26 ? name : `…${name.slice(-25)}`);

/** The heat map of a quantity: layers by the order "" or "value" over the records. */
function layersFigure(run, theme, quantity, chosen, order, axis) {
  const scalar = scalarOf(run, "layers", quantity);
  const scalars = [scalar, ...quantitiesOf(run).filter((other) => other !== scalar)]; // the shown one first
  const { names, rows: places } = layerMap(run);
  const values = places.map((row) => row.map((place, index) => (place === null ? null : (run.records[index].layers[quantity]?.[place] ?? null))));
  const rows = orderOf(values, run, chosen, order);
  const colors = colorsOf(finite(values.flat()), quantity);
  const prefix = commonPrefix(names);
  return {
    height: Math.min(Math.max(120 + 18 * names.length, 260), 900), // the color bar has its title beside it
    data: [
      {
        type: "heatmap", x: run.records.map((record) => record[axis.key]), y: rows.map((row) => literal(names[row])),
        z: rows.map((row) => values[row].map((v) => (v === null ? null : colors.to(v)))), colorscale: LOW_TO_HIGH, hoverongaps: false,
        zmin: colors.to(colors.low), zmax: colors.to(colors.high), colorbar: barOf(colors, scalar.title), meta: { colors: colors.title },
        customdata: rows.map((row) => places[row].map((place, index) => (place === null ? null : new Layer(run.records[index].layers, place, scalars)))),
        hovertemplate: `%{customdata.name}<br>${axis.short} %{x}<br>%{customdata.details}<extra></extra>`, hoverlabel: { align: "left" },
      },
      ...failuresOf(run, axis, theme, "y2"),
    ],
    layout: layoutOf(
      theme, { ...axis.layout, showgrid: false },
      { title: prefix ? `layer of ${literal(prefix.slice(0, -1))}` : "layer", automargin: true, autorange: "reversed", type: "category", showgrid: false,
        tickvals: rows.map((_, index) => index), ticktext: rows.map((row) => clip(names[row].slice(prefix.length))) },
      { shapes: cursor(chosen, axis), yaxis2: OF_FAILURES }
    ),
  };
}

/** The card of the layers, with the choices of a quantity and an order. */
export class LayersCard {
  /** @param {Figures} figures */
  constructor(figures) {
    this.figures = figures;
    this.tools = document.getElementById("layers-tools");
  }

  /**
   * Draw the card.
   * @param {{run: Run, record: Object, theme: Object, quantity: ?string, axis: Object, choices: Object, choose: function(Object)}}
   *   shown As for OneRun; `quantity`: null, where the run knows nothing of layers.
   */
  async draw(shown) {
    const { run, record, theme, quantity, axis, choices, choose } = shown;
    const quantities = quantitiesOf(run).map(({ key, title }) => [key, title]);
    const orders = [["", "network"], ["value", "value at the chosen state"]];
    keepFocus(this.tools, quantity ? [
      menu("Layers by", quantities, quantity, (layers) => { choose({ layers }); this.draw({ ...shown, quantity: layers }); }),
      menu("Order", orders, choices.order, (order) => { choose({ order }); this.draw(shown); }),
    ] : []);
    if (!quantity) return this.figures.absent("layers", "No layers were analyzed: pass layers=\"auto\" to HessianSpectrumCallback, or keep a Krylov basis (not basis=\"none\").");
    const figure = layersFigure(run, theme, quantity, record, choices.order, axis);
    return this.figures.plot("layers", figure, `${scalarOf(run, "layers", quantity).title} of layers, ${run.run}.`, axis);
  }
}
