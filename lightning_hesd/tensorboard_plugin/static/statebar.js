/** The bar of the chosen state, which stays in sight: its run, its epoch, and its main numbers. */

import { when } from "./axis.js";
import { spectrumOf } from "./data.js";
import { button, element, keepFocus, menu, number, typeset } from "./dom.js";
import { intervalOf, within } from "./uncertainty.js";

const KEYS = { ArrowLeft: -1, ArrowRight: 1 };
const TAKE_ARROWS = "input, select, textarea, [contenteditable], .scroll";

export class StateBar {
  /**
   * @param {HTMLElement} place
   * @param {{run: function(string), state: function(Object)}} actions They get the key of a run, and a record.
   */
  constructor(place, actions) {
    this.place = place;
    this.actions = actions;
    document.addEventListener("keydown", (event) => {
      if (!KEYS[event.key] || event.altKey || event.ctrlKey || event.metaKey || event.target.closest?.(TAKE_ARROWS)) return;
      event.preventDefault();
      this.step(KEYS[event.key]);
    });
  }

  /** Show the controls for the records of a run. */
  show(runs, run, record, axis) {
    this.run = run;
    this.slider = element("input", { type: "range", id: "epoch", min: 0, max: run.records.length - 1, step: 1,
      oninput: (event) => this.actions.state(run.records[Number(event.target.value)]) });
    this.name = element("output", { for: "epoch" });
    this.facts = element("span", { class: "facts" });
    const go = (id) => document.getElementById(id).scrollIntoView({ behavior: "smooth" });
    keepFocus(this.place, [
      menu("Run", runs.map((one) => [one.key, one.run]), run.key, this.actions.run),
      element("span", { class: "control wide" },
        button("◀", "One analysis back (left arrow key)", () => this.step(-1)),
        element("label", { class: "control wide" }, element("span", {}, "State"), this.slider),
        button("▶", "One analysis on (right arrow key)", () => this.step(1)), this.name),
      this.facts,
      element("span", { class: "control" }, button("Charts ↑", "Go to the charts over training", () => go("all-title")), button("Detail ↓", "Go to the figures of this state", () => go("detail-title"))),
    ]);
    this.move(record, axis);
  }

  /** Show another record. */
  move(record, axis) {
    const text = when(record, axis);
    this.record = record;
    this.slider.value = this.run.records.indexOf(record);
    this.slider.setAttribute("aria-valuetext", text);
    this.name.textContent = text;
    this.facts.replaceChildren(...factsOf(record));
  }

  step(by) {
    const next = this.run?.records[this.run.records.indexOf(this.record) + by];
    if (next) this.actions.state(next);
  }
}

/** Return the main numbers of a record. */
function factsOf(record) {
  const spectrum = spectrumOf(record);
  if (!spectrum) return [record.error ? "The analysis failed." : "There is no spectrum on the training data."];
  const { c_t: value, c_t_low: low, c_t_high: high, lambda_max: largest, loss, type } = spectrum;
  const ofCt = type === null ? "C_t undefined" : `C_t = ${value === null ? "−∞" : within(value, low, high)} ${intervalOf(low, high)}, ${type}`;
  return typeset([ofCt, `λ_max = ${number(largest, 3)}`, `loss ${number(loss, 3)}`].join(" · "));
}
