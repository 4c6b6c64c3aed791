/** The figures of the page: drawing, zoom, the legend beside each, and what happens at the pointer. */

import { axisTicks } from "./axis.js";
import { element } from "./dom.js";
import { keysOf } from "./swatches.js";

const CONFIG = { displayModeBar: false, displaylogo: false, doubleClick: false }; // without it, Plotly would draw anew
const PALE = 0.12; // opacity of the other curves while the pointer is on a run

export class Figures {
  /**
   * @param {{click: function(Object, Event), hover: function(string, ?Object, ?Event), zoom: function(string, ?Object)}} actions
   *   `hover` gets the id of a figure and the points at the pointer, null when it leaves; `zoom` the ranges {x, y} of a figure
   *   that differ from those that it is drawn with, null after a reset.
   */
  constructor(actions) {
    this.actions = actions;
    this.zooms = {};
    this.drawn = {}; // by id: {layout, axis}, as without a zoom
    this.sizes = new ResizeObserver((entries) => entries.forEach(({ target }) => fit(target)));
  }

  /** Draw a figure; `axis` is its horizontal axis, if that goes along the training. */
  async plot(id, { data, layout, height = null }, label, axis = null) {
    const node = document.getElementById(id);
    this.drawn[id] = { layout, axis };
    if (!node.classList.contains("js-plotly-plot")) node.replaceChildren();
    node.classList.remove("absent");
    node.setAttribute("aria-label", label);
    node.style.height = height ? `${height}px` : "";
    document.getElementById(`${id}-keys`).replaceChildren(...keysOf(data));
    await Plotly.react(node, data, this.layoutOf(id), CONFIG);
    if (!node.hesd) this.listen(node, id);
  }

  /** Return the layout of a figure with its zoom; Plotly changes what it gets. */
  layoutOf(id) {
    const { layout, axis } = this.drawn[id];
    const made = { showlegend: false, ...structuredClone(layout) };
    const zoom = this.zooms[id] ?? {};
    if (zoom.x) Object.assign(made.xaxis, { range: zoom.x }, axis ? axisTicks(axis, zoom.x) : {});
    if (zoom.y) Object.assign(made.yaxis, { range: zoom.y }, made.yaxis.type === "log" ? { tickvals: undefined, ticktext: undefined, dtick: undefined } : {});
    return made;
  }

  listen(node, id) {
    node.hesd = true;
    node.on("plotly_click", ({ points, event }) => this.actions.click(points, event));
    node.on("plotly_hover", ({ points, event }) => this.actions.hover(id, points, event));
    node.on("plotly_unhover", () => this.actions.hover(id, null, null));
    node.on("plotly_doubleclick", () => this.reset(id));
    node.on("plotly_relayout", (changes) => this.zoomed(node, id, Object.keys(changes)));
    this.sizes.observe(node);
  }

  /** Keep a zoom, and give it ticks of its own. */
  zoomed(node, id, changed) {
    const axes = ["x", "y"].filter((axis) => changed.some((key) => key.startsWith(`${axis}axis.range`)));
    if (!axes.length) return;
    const rounded = (range) => range.map((end) => Number(end.toPrecision(6)));
    this.zooms = { ...this.zooms, [id]: { ...this.zooms[id], ...Object.fromEntries(axes.map((axis) => [axis, rounded(node.layout[`${axis}axis`].range)])) } };
    this.actions.zoom(this.zooms);
    Plotly.react(node, node.data, this.layoutOf(id), CONFIG);
  }

  /** Undo the zoom. */
  reset(id) {
    this.forget([id]);
    const node = document.getElementById(id);
    if (node.data) Plotly.react(node, node.data, this.layoutOf(id), CONFIG);
    this.actions.zoom(this.zooms);
  }

  /** Forget the zooms of figures that will show something else, or one axis of each. */
  forget(ids, axes = ["x", "y"]) {
    const kept = Object.entries(this.zooms).map(([id, zoom]) => [id, ids.includes(id) ? Object.fromEntries(Object.entries(zoom).filter(([axis]) => !axes.includes(axis))) : zoom]);
    this.zooms = Object.fromEntries(kept.filter(([, zoom]) => Object.keys(zoom).length));
  }

  /** Show a text in place of a figure. */
  absent(id, text) {
    const node = document.getElementById(id);
    if (node.classList.contains("js-plotly-plot")) Plotly.purge(node);
    this.sizes.unobserve(node);
    node.hesd = false;
    node.classList.add("absent");
    node.setAttribute("aria-label", text);
    node.style.height = "";
    node.replaceChildren(element("p", {}, text));
    document.getElementById(`${id}-keys`).replaceChildren();
  }

  /** Replace the line at the chosen record. */
  async mark(id, shapes) {
    const node = document.getElementById(id);
    if (!node.data) return;
    const { layout } = this.drawn[id];
    const isOther = (shape) => !shape.name?.startsWith("chosen");
    layout.shapes = [...(layout.shapes ?? []).filter(isOther), ...shapes];
    await Plotly.relayout(node, { shapes: structuredClone(layout.shapes) });
  }

  /** Let the curves of a run or group stand out in these figures; null: of none. */
  emphasize(ids, key) {
    for (const id of ids)
      for (const group of document.querySelectorAll(`#${id} .scatterlayer .trace`)) {
        const { legendgroup } = group.__data__?.[0]?.trace ?? {};
        group.style.opacity = key !== null && legendgroup && legendgroup !== key ? PALE : "";
      }
  }

  /** Return a figure that is drawn, with its zoom. */
  figureOf(id) {
    return { data: document.getElementById(id).data, layout: this.layoutOf(id) };
  }
}

/** Give a figure the size of its place. */
function fit(node) {
  const { width, height } = node._fullLayout ?? {};
  const isOff = Math.abs(width - node.clientWidth) > 1 || Math.abs(height - node.clientHeight) > 1; // sizes are rounded
  if (node.data && node.clientWidth && isOff) Plotly.Plots.resize(node);
}
