/** The page: what is chosen, and what has to be drawn when a choice changes. */

import { link, readChoices, watchAddress, writeChoices, writeSoon } from "./address.js";
import { CHARTS, AllRuns, nearestOf } from "./allruns.js";
import { axisOf, hasTimes } from "./axis.js";
import { quantityOf } from "./data.js";
import { fillTable, saveCsv, saveJson } from "./datatable.js";
import { button, copyButton, element, keepFocus, menu } from "./dom.js";
import { openExport } from "./export.js";
import { Figures } from "./figures.js";
import { groupsOf, patternOf } from "./grouping.js";
import { JudgmentCard } from "./judgment.js";
import { layOut } from "./layout.js";
import { OF_ONE_RUN, OF_ONE_STATE, OneRun } from "./onerun.js";
import { RunList } from "./runlist.js";
import { RunStore } from "./runstore.js";
import { StateBar } from "./statebar.js";
import { watchTheme } from "./theme.js";
import { findingsOf } from "./words.js";

/**
 * Show runs.
 * @param {{runs: function(): Promise<Object>, load: function(string, string): Promise<Object>,
 *   loadBrief: function(string, string): Promise<Object>,
 *   judge: function({run: string, name: string}[], string): Promise<Object>,
 *   folderOf: function(string): Promise<string>, live: ?number, onReload: ?function(function())}} source
 * @param {HTMLElement} root
 */
export async function start(source, root) {
  const page = new Page(source, root);
  watchTheme((theme) => page.setTheme(theme));
  watchAddress(() => page.restore());
  source.onReload?.(() => page.refresh());
  await page.refresh();
  if (source.live) setInterval(() => document.hidden || !page.follow || page.refresh(), source.live);
}

class Page {
  constructor(source, root) {
    this.source = source;
    this.root = root;
    this.store = new RunStore(source);
    this.choices = readChoices();
    this.follow = true;
    this.parts = layOut(root, {
      exportFigure: (id, title) => this.exportFigure(id, title),
      reset: (id) => this.figures.reset(id),
      openTable: () => fillTable(this.parts.table, this.runs),
      saveJudgment: () => this.judgment.save(),
    });
    this.figures = new Figures({
      click: (points, event) => this.clicked(points, event),
      hover: (id, points, event) => this.allRuns.hover(id, points, event),
      zoom: (zooms) => this.choose({ zooms }),
    });
    this.figures.zooms = this.choices.zooms;
    this.list = new RunList(this.parts.runs, {
      select: (keys, chosen) => this.select(keys, chosen),
      filter: (filter) => this.choose({ filter }, () => this.show()),
      group: (groups) => this.choose({ groups }, () => this.show()),
      point: (key) => this.allRuns.emphasize(key),
    });
    this.bar = new StateBar(this.parts.detailTools, { run: (key) => this.setDetail(key), state: (record) => this.setState(record) });
    this.allRuns = new AllRuns(this.figures, root, (id, scale) => this.setScale(id, scale));
    this.oneRun = new OneRun(this.figures, this.parts, root);
    this.judgment = new JudgmentCard(source.judge, this.parts.judgment);
  }

  // What is shown ---------------------------------------------------------------------------------------------------

  get runs() {
    return this.store.shownBy(this.choices.filter);
  }

  /** What the charts have lines of: the runs, or their groups. */
  get members() {
    const { pattern } = patternOf(this.choices.groups);
    return pattern ? groupsOf(this.runs, pattern) : this.runs;
  }

  get detailed() {
    return this.runs.find((run) => run.key === this.choices.detail) ?? this.runs[0] ?? null;
  }

  /** The chosen record: of that step, or the last. */
  get record() {
    const run = this.detailed;
    return run ? (run.records.find((r) => r.global_step === this.choices.state) ?? run.records.at(-1)) : null;
  }

  axisOf(runs) {
    const { x } = this.choices;
    return axisOf(runs, x === "time" && !hasTimes(runs) ? "" : x);
  }

  /** What the figures of one run show; the quantity of layers is null if the run knows nothing of them. */
  get detail() {
    const { detailed: run, record, theme, choices } = this;
    const others = this.runs.filter((other) => other !== run);
    const whole = (wanted) => this.store.whole(wanted.map(({ key }) => key));
    const choose = (changes) => this.choose(changes);
    return { run, record, others, whole, theme, choices, choose, quantity: quantityOf(run, choices.layers), axis: this.axisOf([run]) };
  }

  // Choices ---------------------------------------------------------------------------------------------------------

  /** List the runs, load selected runs that have changed, and draw them. */
  async refresh() {
    if (this.busy) return;
    this.busy = true;
    try {
      await this.store.list(this.choices.runs);
      if ((await this.load()) || !this.drawn) await this.show();
    } catch (error) {
      this.store.failures = [`The runs cannot be read: ${error.message}`];
      this.showProblems();
    } finally {
      this.busy = false;
    }
  }

  /** Load what is selected, and return whether there was anything to load. */
  async load() {
    if (!this.store.wanted.length) return false;
    const loading = this.store.load(this.choices.detail || this.store.firstOf(this.choices.filter));
    if (this.drawn) this.showList();
    await loading;
    return true;
  }

  setTheme(theme) {
    this.theme = theme;
    if (this.drawn) this.show();
  }

  /** Take choices, note them in the address, and follow them. */
  choose(changes, follow = null) {
    Object.assign(this.choices, changes);
    writeSoon(this.choices);
    return follow?.();
  }

  /** Take the choices of an address that has changed. */
  async restore() {
    const choices = readChoices();
    if (JSON.stringify(choices) === JSON.stringify(this.choices)) return;
    this.choices = choices;
    this.figures.zooms = choices.zooms;
    this.store.selectAnew(choices.runs);
    await this.load();
    await this.show();
  }

  async select(keys, chosen) {
    this.choose({ runs: this.store.select(keys, chosen) });
    await this.load();
    await this.show();
  }

  /** Show a run in detail; a chosen epoch stays where the run has it. */
  setDetail(key) {
    const { epoch } = this.record;
    const same = this.choices.state === null ? null : this.runs.find((run) => run.key === key)?.records.find((r) => r.epoch === epoch);
    this.figures.forget(OF_ONE_RUN);
    this.choose({ detail: key, state: same?.global_step ?? null, zooms: this.figures.zooms });
    this.showBar();
    return Promise.all([this.allRuns.mark(this.record), this.drawDetail()]);
  }

  /** Move to another record; the charts stay as they are, but for the line at it. */
  setState(record) {
    this.choose({ state: record.global_step });
    if (this.pending) return;
    this.pending = requestAnimationFrame(async () => {
      this.pending = null;
      const began = performance.now();
      this.bar.move(this.record, this.axisOf([this.detailed]));
      await Promise.all([this.allRuns.mark(this.record), this.detailed.isWhole ? this.oneRun.move(this.detail) : null]);
      performance.measure("hesd move", { start: began });
    });
  }

  setAxis(x) {
    this.figures.forget([...CHARTS, "map", "layers"], ["x"]);
    this.choose({ x, zooms: this.figures.zooms }, () => this.show());
  }

  setScale(id, scale) {
    this.figures.forget([id], ["y"]);
    this.choose({ scales: { ...this.choices.scales, [id]: scale }, zooms: this.figures.zooms }, () => this.drawCharts());
  }

  /** A click on a curve, or on a heat map, chooses that state. */
  clicked(points, event) {
    const point = nearestOf(points, event);
    const { meta, type, customdata } = point.data;
    const key = meta?.key;
    if (key && key !== this.detailed.key && this.runs.some((run) => run.key === key)) this.setDetail(key);
    const run = this.detailed;
    const axis = this.axisOf([run]);
    const isHere = key || type === "heatmap" ? (record) => record[axis.key] === point.x : () => false;
    const record = run.records.find((r) => key && r.global_step === customdata?.[point.pointNumber]?.[1]) ?? run.records.find(isHere);
    if (record) this.setState(record);
  }

  // Showing ---------------------------------------------------------------------------------------------------------

  /** Show everything anew. */
  async show() {
    const { empty, runs, nothing, content } = this.parts;
    const { listed } = this.store;
    empty.hidden = listed.length > 0;
    runs.hidden = listed.length === 0;
    content.hidden = this.runs.length === 0;
    nothing.hidden = listed.length === 0 || this.runs.length > 0;
    nothing.textContent = this.store.whyNothing;
    this.showList();
    this.showProblems();
    if (this.runs.length) {
      this.showTools();
      this.showBar();
      fillTable(this.parts.table, this.runs);
      this.parts.findings.replaceChildren(...findingsOf(this.runs));
      await this.draw();
      this.judgment.setRuns(this.runs); // after the figures, which must not wait for it
    }
    this.drawn = true;
  }

  showProblems() {
    this.parts.problems.replaceChildren(...this.store.problems.map((text) => element("p", { class: "problem", role: "alert" }, text)));
  }

  showList() {
    const { listed, selected, loading } = this.store;
    const named = listed.map((one) => ({ key: one.key, color: one.color, name: this.store.nameOf(one) }));
    this.list.show(named, { selected, loading, theme: this.theme, filter: this.choices.filter, groups: this.choices.groups });
  }

  showTools() {
    const { runs } = this;
    const axes = [["epoch", "epoch"], ["step", "optimizer step"], ...(hasTimes(runs) ? [["time", "time"]] : [])];
    const follow = element("input", { type: "checkbox", checked: this.follow, onchange: (event) => (this.follow = event.target.checked) });
    keepFocus(this.parts.tools, [
      menu("Horizontal axis", axes, this.axisOf(runs).kind, (x) => this.setAxis(x)),
      this.source.live ? element("label", { class: "control" }, follow, "Follow the training") : null,
      this.source.live ? button("Reload", "Reload the data now", () => this.refresh()) : null,
      copyButton("Copy link", "Copy the address of this page with all that is chosen", () => { writeChoices(this.choices); return link(); }),
      button("CSV", "Save the data table as CSV", () => saveCsv(this.runs)),
      button("JSON", "Save all data as JSON", async () => saveJson(await this.store.whole(this.runs.map(({ key }) => key)))),
    ]);
  }

  showBar() {
    const { runs, detailed, record } = this;
    this.bar.show(runs, detailed, record, this.axisOf([detailed]));
  }

  // Drawing ---------------------------------------------------------------------------------------------------------

  /** Draw all figures: the charts first, since the data of one run in detail may be on their way. */
  async draw() {
    await this.source.ready;
    const began = performance.now();
    await this.drawCharts();
    performance.measure("hesd charts", { start: began });
    await this.drawDetail();
    performance.measure("hesd draw", { start: began });
    this.root.dataset.drawn = String(Number(this.root.dataset.drawn ?? 0) + 1);
  }

  drawCharts() {
    const { runs, members, theme, record: chosen } = this;
    return this.allRuns.draw({ runs, members, theme, chosen, axis: this.axisOf(runs), scales: this.choices.scales });
  }

  /** Draw the figures of one run. */
  async drawDetail() {
    const key = this.detailed?.key;
    const [run] = await this.store.whole([key]);
    if (!run) return this.showProblems();
    if (key !== this.detailed?.key) return; // another one was chosen meanwhile
    if (this.bar.run !== run) this.showBar(); // with the records that have been loaded now
    await this.oneRun.draw(this.detail);
  }

  /** Open the export of a figure. */
  exportFigure(id, title) {
    const { run, record, quantity, theme } = this.detail;
    const runs = OF_ONE_RUN.includes(id) ? [run] : this.runs;
    const shown = { id, title, figure: this.figures.figureOf(id), runs, record: OF_ONE_STATE.includes(id) ? record : null, axis: this.axisOf(runs) };
    openExport({ ...shown, quantity, theme, folderOf: this.source.folderOf });
  }
}
