/** The card of the densities at the chosen state: which spectra, on which axis, and which other states beside it. */

import { axisOf, when } from "./axis.js";
import { indexed, layoutOf, literal } from "./base.js";
import { SPECTRA, extent, spectrumOf } from "./data.js";
import { axisOfDensity, densityOn, powerOfTen, smoothingOf, symlogTicks } from "./distribution.js";
import { button, element, keepFocus, number } from "./dom.js";
import { swatch } from "./swatches.js";
import { faint } from "./theme.js";

const SINGLE = 0.05; // lower end of a logarithmic axis, relative to the density of one eigenvalue
const LOWEST_PART = 1e-10; // where rounding begins to matter
const MOST_BANDS = 2; // more of them hide each other
const MOST_PINS = 6;
const FIELDS = SPECTRA.map(({ field }) => field);

/** Return the curves to draw: one for each spectrum of the chosen state and of the pinned ones. */
function curvesOf(states, theme, hidden) {
  return states.flatMap(({ title, key, run, record, isPinned, color }, place) =>
    SPECTRA.filter(({ field }) => spectrumOf(record, field)).map(({ field, label, dash }) => ({
      spectrum: spectrumOf(record, field), field, key, run, step: record.global_step, dash, isPinned, isShown: !hidden.has(field),
      label: states.length > 1 ? `${title}, ${label}` : label, group: `${place} ${field}`,
      // With several states, colors tell states apart and dashes spectra.
      color: isPinned ? theme.pins[color] : colorOfField(states.length > 1 ? "spectrum" : field, theme),
    }))
  );
}

const colorOfField = (field, theme) => theme[field === "spectrum" ? "training" : field];

/** The densities of states, the chosen one first, with nodes and extremes; at least one spectrum must not be hidden. */
function densityFigure(states, theme, hidden, isLinear) {
  const found = curvesOf(states, theme, hidden);
  const shown = found.filter(({ isShown }) => isShown);
  const scale = axisOfDensity(shown.map(({ spectrum }) => spectrum), isLinear);
  const hasBands = shown.filter(({ isPinned }) => !isPinned).length <= MOST_BANDS;
  const curves = found.map((one) => ({ ...one, ...densityOn(one.spectrum, scale), hasBand: hasBands && !one.isPinned }));
  const [bottom, top] = heights(curves.filter(({ isShown }) => isShown), scale);
  const ticks = isLinear ? {} : ticksOf(scale);
  const [name, unit] = nameOf(shown.map(({ spectrum }) => spectrum.matrix));
  return {
    data: curves.flatMap((curve, index) => tracesOf(curve, index, scale, bottom, top, theme)),
    layout: layoutOf(
      theme,
      { title: isLinear ? name + unit : `${name} (symlog, linear below ${powerOfTen(scale.linear)})`, ...ticks },
      { title: isLinear ? "spectral density" : "share of eigenvalues per decade", type: "log", range: [Math.log10(bottom), Math.log10(top * 3)],
        exponentformat: "power", nticks: 7 }
    ),
  };
}

/** Return the name of the eigenvalues of matrices, and their unit: preconditioned ones have another. */
function nameOf(matrices) {
  const [first] = matrices;
  const name = !matrices.every((matrix) => matrix === first) ? "eigenvalue" : first === "hessian" ? "Hessian eigenvalue" : `eigenvalue, ${first}`;
  return [name, matrices.some((matrix) => matrix.startsWith("preconditioned")) ? "" : " (loss / parameter²)"];
}

function ticksOf(scale) {
  const { places, texts } = symlogTicks({ ...scale, high: Math.max(scale.high, scale.linear), low: Math.min(scale.low, -scale.linear) });
  const inside = places.map((_, i) => i).filter((i) => (places[i] >= 0 || scale.low < 0) && (places[i] <= 0 || scale.high > 0));
  return { tickvals: inside.map((i) => places[i]), ticktext: inside.map((i) => texts[i]) };
}

/** Return the ends of the axis of densities. */
function heights(curves, scale) {
  const [, top] = extent(curves.flatMap(({ values }) => values));
  if (scale.linear === null) {
    const peaks = ({ spectrum, grid, values }) => {
      const nodes = new Set(spectrum.nodes);
      return values.filter((value, i) => nodes.has(grid[i]) && value > 0);
    };
    return [Math.max(extent(curves.flatMap(peaks))[0] / 100, top * LOWEST_PART), top];
  }
  const single = ({ spectrum }) => 1 / ((spectrum.dimension ?? 1e6) * smoothingOf(spectrum, scale) * Math.sqrt(2 * Math.PI));
  return [Math.max(SINGLE * Math.min(...curves.map(single)), top * LOWEST_PART), top];
}

/** Return band, curve, nodes and extremes of a spectrum: one group, which is shown or hidden as a whole. */
function tracesOf({ spectrum, field, key, run, step, label, group, color, dash, isPinned, isShown, hasBand, grid, values, band }, index, scale, bottom, top, theme) {
  const shared = { legendgroup: group, visible: isShown ? true : "legendonly", showlegend: false };
  const eigenvalues = (places) => places.map(scale.back);
  const rug = bottom * (top / bottom) ** (0.02 + 0.035 * index);
  const ends = [spectrum.lambda_min, spectrum.lambda_max].map(scale.to);
  const clipped = (list) => list.map((value) => Math.max(value, bottom / 10));
  const bands = band && hasBand ? [{
    ...shared, x: [...grid, ...grid.toReversed()], y: clipped([...band.high, ...band.low.toReversed()]), mode: "lines", line: { width: 0 },
    fill: "toself", fillcolor: faint(color, 0.16), hoverinfo: "skip", meta: { density_band: label, field },
  }] : [];
  return [
    ...bands,
    {
      ...shared, showlegend: true, x: grid, y: clipped(values), mode: "lines", line: { color, width: isPinned ? 1.3 : 1.8, dash },
      name: `${literal(label)}: ${indexed("λ_min")} ${number(spectrum.lambda_min, 3)}, ${indexed("λ_max")} ${number(spectrum.lambda_max, 3)}`, meta: { density: label, field, key, run, step },
      customdata: eigenvalues(grid), hovertemplate: `${literal(label)}<br>λ = %{customdata:.4g}<br>density %{y:.3g}<extra></extra>`,
    },
    {
      ...shared, x: spectrum.nodes.map(scale.to), y: spectrum.nodes.map(() => rug), mode: "markers", meta: { nodes: label, field },
      marker: { symbol: "line-ns-open", size: 8, color, line: { width: 1 } }, customdata: spectrum.nodes.map((node, i) => [node, spectrum.weights[i]]),
      hovertemplate: "node %{customdata[0]:.4g}<br>weight %{customdata[1]:.3g}<extra></extra>",
    },
    {
      ...shared, x: ends.flatMap((end) => [end, end, null]), y: ends.flatMap(() => [bottom / 10, top * 1000, null]), mode: "lines", hoverinfo: "skip",
      line: { color: isPinned ? faint(color, 0.6) : color, width: 1, dash: dash === "solid" ? "dot" : dash }, meta: { extremes: label, field },
    },
  ].map((trace) => ({ ...trace, hoverlabel: { bordercolor: theme.paper } }));
}

/** The choices beside the chart: the axis, the spectra and the pinned states. */
export class DensityCard {
  /** `redraw` draws the chart anew after a choice. */
  constructor(redraw) {
    this.redraw = redraw;
    this.pins = []; // states, with isPinned, and color: a position in theme.pins
    this.tools = element("div", { class: "tools small", id: "density-choices", role: "group", "aria-label": "Density at the chosen state" });
    document.getElementById("density").before(this.tools);
  }

  /** Return the figure of a record, with the pinned states; null: no state has a spectrum. `shown` is as for OneRun, with `axis`. */
  figure(shown) {
    const { run, record, theme, axis, choices } = shown;
    this.choose = shown.choose;
    this.scales = choices.scales;
    this.hidden = new Set(FIELDS.filter((field) => !(choices.spectra ?? FIELDS.slice(0, 2)).includes(field)));
    const chosen = stateIn(run, record, axis);
    const pins = this.pins.filter((pin) => !isSame(pin, chosen));
    const states = named([chosen, ...pins]);
    const present = SPECTRA.filter(({ field }) => states.some((state) => spectrumOf(state.record, field)));
    // Of spectra that are all hidden the first one is shown: an empty chart helps nobody.
    if (present.every(({ field }) => this.hidden.has(field))) this.hidden.delete(present[0]?.field);
    this.showTools(shown, chosen);
    return present.length ? densityFigure(states, theme, this.hidden, this.isLinear) : null;
  }

  get isLinear() {
    return this.scales.density === "linear";
  }

  setLinear(isLinear) {
    const { density, ...others } = this.scales;
    this.choose({ scales: isLinear ? { ...others, density: "linear" } : others });
    this.redraw();
  }

  hide(field, isHidden) {
    this.only(...FIELDS.filter((other) => (other === field ? !isHidden : !this.hidden.has(other))));
  }

  only(...spectra) {
    this.choose({ spectra: String(spectra) === String(FIELDS.slice(0, 2)) ? null : spectra });
    this.redraw();
  }

  pin(...states) {
    for (const state of states.filter((one) => !this.pins.some((pin) => isSame(pin, one)))) {
      if (this.pins.length === MOST_PINS) this.pins.shift();
      const color = Array.from({ length: MOST_PINS }, (_, i) => i).find((i) => !this.pins.some((pin) => pin.color === i));
      this.pins.push({ ...state, isPinned: true, color });
    }
    this.redraw();
  }

  unpin(pin) {
    this.pins = this.pins.filter((one) => !isSame(one, pin));
    this.redraw();
  }

  showTools({ run, others, whole, theme }, chosen) {
    const records = [...run.records, ...this.pins.map(({ record }) => record)];
    const present = SPECTRA.filter(({ field }) => records.some((record) => spectrumOf(record, field)));
    const line = ({ field, dash }) => swatch({ color: this.pins.length ? theme.muted : colorOfField(field, theme), dash });
    const boxes = present.map((one) => element("label", { class: "control" },
      element("input", { type: "checkbox", checked: !this.hidden.has(one.field), "data-field": one.field, onchange: (event) => this.hide(one.field, !event.target.checked) }),
      line(one), one.title));
    const has = (field) => present.some((one) => one.field === field);
    const both = ["spectrum", "generalization"];
    const isOnly = (fields) => present.every(({ field }) => this.hidden.has(field) !== fields.includes(field));
    const presets = [["training", both.slice(0, 1)], ["generalization", both.slice(1)], ["both", both]]
      .map(([text, fields]) => ({ text, isPressed: isOnly(fields), press: () => this.only(...fields) }));
    const axes = [["symlog", false], ["linear", true]]
      .map(([text, isLinear]) => ({ text, isPressed: this.isLinear === isLinear, press: () => this.setLinear(isLinear) }));
    const pinOthers = async () => this.pin(...(await whole(others)).map((other) => stateIn(other, sameTime(other, chosen.record), axisOf([other]))));
    keepFocus(this.tools, [
      segmented("Axis of eigenvalues", axes),
      both.every(has) ? segmented("Spectra", presets) : null,
      ...(present.length > 1 ? boxes : []),
      button("Pin this state", "Keep the densities of this state in the chart while you choose others", () => this.pin(chosen)),
      others.length ? button("Pin other runs", "Put the other selected runs beside it, each at the same time or its last one before", pinOthers) : null,
      ...(this.pins.length ? named([chosen, ...this.pins]) : []).map((state) => element("span", { class: "pin" },
        swatch({ color: state.isPinned ? theme.pins[state.color] : theme.training, dash: "solid" }), state.title, state.isPinned ? button("×", `Remove ${state.title}`, () => this.unpin(state)) : null)),
    ]);
  }
}

const stateIn = (run, record, axis) => ({ key: run.key, run: run.run, time: when(record, axis), record });

const isSame = (one, other) => one.key === other.key && one.record.global_step === other.record.global_step;

/** Give states a title: the time, and the run where they are of several. */
function named(states) {
  const isOfOne = states.every(({ key }) => key === states[0].key);
  return states.map((state) => ({ ...state, title: isOfOne ? state.time : `${state.run}, ${state.time}` }));
}

/** Return the record of a run at the epoch of another record, or the last one before; else the first. */
function sameTime(run, { epoch }) {
  return run.records.findLast((record) => record.epoch <= epoch) ?? run.records[0];
}

/** Make buttons of which one is pressed, {text, isPressed, press} each, with a label in front. */
function segmented(label, choices) {
  const buttons = choices.map(({ text, isPressed, press }) =>
    element("button", { type: "button", "aria-pressed": String(isPressed), "aria-label": `${label}: ${text}`, onclick: press }, text));
  return element("span", { class: "segmented" }, element("span", { "aria-hidden": "true" }, label), ...buttons);
}
