/** The list of runs: their selection, and the legend of all charts. */

import { button, element } from "./dom.js";
import { groupName, patternOf } from "./grouping.js";
import { swatchOf } from "./swatches.js";

const IN_A_LINE = 6; // runs that stand in a line above the charts
const WAIT_MS = 200; // after a key, before the charts follow

const GROUP_EXAMPLES = [
  ["/version_\\d+", "without Lightning's version"],
  ["[-_/]?seed[-_=]?\\d+", "without the seed"],
  ["^([^/]+)", "by the first folder"],
];

export class RunList {
  /**
   * @param {HTMLFieldSetElement} place
   * @param {{select: function(string[], boolean), filter: function(string), group: function(string), point: function(?string)}} actions
   *   `point` gets the key of the run or group that the pointer is on, null when it leaves.
   */
  constructor(place, actions) {
    this.place = place;
    this.actions = actions;
    this.filter = field("run-filter", "Filter", "regular expression", (text) => actions.filter(text));
    this.groups = field("run-groups", "Group by", "regular expression", (text) => actions.group(text), { list: "group-examples" });
    this.count = element("output", { id: "run-count" });
    this.problem = element("p", { class: "problem", role: "alert", hidden: true });
    this.rows = element("div", { class: "rows", onmouseleave: () => actions.point(null) });
    this.shown = []; // keys that the filter leaves
    const choose = (chosen) => actions.select(this.shown, chosen);
    this.tools = element("div", { class: "list-tools" },
      this.filter.label, this.groups.label,
      element("datalist", { id: "group-examples" }, ...GROUP_EXAMPLES.map(([value, label]) => element("option", { value, label }))),
      element("span", { class: "control" },
        button("All", "Select all runs that the filter leaves", () => choose(true)), button("None", "Select no run", () => choose(false)), this.count));
    place.replaceChildren(element("legend", {}, "Runs"), this.tools, this.problem, this.rows);
  }

  /**
   * Show runs.
   * @param {{key: string, name: string, color: number}[]} listed All runs.
   * @param {{selected: Set<string>, filter: string, groups: string, theme: Object, loading: number}} state
   */
  show(listed, { selected, filter, groups, theme, loading }) {
    const by = { filter: patternOf(filter), groups: patternOf(groups) };
    const left = listed.filter(({ name }) => !by.filter.pattern || by.filter.pattern.test(name));
    this.shown = left.map(({ key }) => key);
    this.filter.set(filter);
    this.groups.set(groups);
    const problem = by.filter.problem ?? by.groups.problem ?? (left.length ? null : `No run has a name that matches “${filter}”.`);
    this.problem.hidden = problem === null;
    this.problem.textContent = problem ?? "";
    const chosen = left.filter(({ key }) => selected.has(key)).length;
    this.count.textContent = `${chosen} of ${listed.length}${loading ? ", loading …" : ""}`;
    this.tools.hidden = listed.length < 2;
    this.place.parentNode.classList.toggle("many", listed.length > IN_A_LINE);
    this.draw(by.groups.pattern ? this.grouped(left, by.groups.pattern, selected, theme) : left.map((one) => this.row(one, selected, theme)));
  }

  /** Replace the rows; the focus must survive. */
  draw(rows) {
    const focused = document.activeElement?.dataset?.key;
    this.rows.replaceChildren(...rows);
    if (focused) [...this.rows.querySelectorAll("input")].find((box) => box.dataset.key === focused)?.focus({ preventScroll: true });
  }

  row({ key, name, color }, selected, theme) {
    const box = element("input", { type: "checkbox", checked: selected.has(key), "data-key": key, onchange: (event) => this.actions.select([key], event.target.checked) });
    const sample = theme ? swatchOf(theme, color) : null;
    return element("label", { class: "run", title: name, onmouseenter: () => this.actions.point(key) }, box, sample, element("span", {}, name));
  }

  /** Return a heading for each group, with its runs below, which are not drawn by themselves. */
  grouped(left, pattern, selected, theme) {
    const groups = new Map();
    for (const one of left) {
      const name = groupName(one.name, pattern);
      groups.set(name, [...(groups.get(name) ?? []), one]);
    }
    // Colors are given to those that are drawn, in their order: see groupsOf.
    const drawn = [...groups].filter(([, runs]) => runs.some(({ key }) => selected.has(key))).map(([name]) => name);
    return [...groups].flatMap(([name, runs]) => {
      const color = drawn.indexOf(name);
      const chosen = runs.filter(({ key }) => selected.has(key));
      const box = element("input", {
        type: "checkbox", checked: chosen.length === runs.length, "data-key": `group:${name}`,
        onchange: (event) => this.actions.select(runs.map(({ key }) => key), event.target.checked),
      });
      box.indeterminate = chosen.length > 0 && chosen.length < runs.length;
      const sample = theme && color >= 0 ? swatchOf(theme, color) : null;
      const head = element("label", { class: "run group", title: name, onmouseenter: () => this.actions.point(`group:${name}`) },
        box, sample, element("span", {}, name), element("small", {}, `${chosen.length} of ${runs.length}`));
      return [head, ...runs.map((run) => this.member(run, selected))];
    });
  }

  member(run, selected) {
    const row = this.row(run, selected, null);
    row.classList.add("member");
    return row;
  }
}

/** Make a field for a pattern, which calls back a moment after the last key. */
function field(id, name, hint, change, more = {}) {
  let timer = null;
  const input = element("input", { type: "search", id, placeholder: hint, spellcheck: "false", autocomplete: "off", ...more });
  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => change(input.value), WAIT_MS);
  });
  const set = (text) => {
    if (input !== document.activeElement) input.value = text;
  };
  return { label: element("label", { class: "control" }, element("span", {}, name), input), set };
}
