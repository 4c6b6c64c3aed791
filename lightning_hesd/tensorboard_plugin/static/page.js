/** The page: its state, its controls, and the drawing of its figures. */

import { indexed, literal } from "./base.js";
import { ctFigure, deltasFigure, extremesFigure, lossFigure } from "./curves.js";
import { axisOf, column, finite, median, ofSpectrum, quantitiesOf, quantityOf, scalarOf, spectrumOf, tableOf, toCsv, when } from "./data.js";
import { cumulativeFigure, cursor, densityFigure, layersFigure, lossesAlongFigure, mapFigure } from "./details.js";
import { button, download, element, keepFocus, menu, table } from "./dom.js";
import { JudgmentCard } from "./judgment.js";
import { layOut } from "./layout.js";
import { referenceOf } from "./reference.js";
import { SYMBOLS, colorOf, watchTheme } from "./theme.js";
import { assessmentOf, findingsOf, pickOf, summary } from "./words.js";

const AT_FIRST = 10; // runs that are selected at first
const SMALL = 0.1; // smaller values of C_t are legible on the logarithmic axis only
const OF_ONE_RUN = new Set(["map", "density", "cumulative", "along", "layers"]);
const NOT_ALONG =
  "The loss was not evaluated along eigenvectors: pass loss_along_eigenvectors=True to HessianSpectrumCallback, with a Krylov basis (not basis=\"none\").";
const THRESHOLDS = { c_t: -0.6, delta_r_e: 1.5, delta_k_h05: 1.2 }; // without a record, which has them

/**
 * Show runs.
 * @param {{runs: function(): Promise<Object>, load: function(string, string): Promise<Object>,
 *   judge: function({run: string, name: string}[], string): Promise<Object>, live: ?number}} source
 * @param {HTMLElement} root
 */
export async function start(source, root) {
  const page = new Page(source, root);
  watchTheme((theme) => page.setTheme(theme));
  await page.refresh();
  if (source.live) setInterval(() => document.hidden || !page.follow || page.refresh(), source.live);
}

class Page {
  constructor(source, root) {
    this.source = source;
    this.root = root;
    this.listed = []; // {key, run, name, color, stamp}
    this.loaded = new Map(); // key -> Run
    this.selected = new Set(); // keys
    this.known = new Set(); // keys of runs that were listed before
    this.detail = null; // key of the run shown in detail
    this.step = null; // step of its chosen record; null: the last one
    this.scale = null; // of the axis of C_t; null: chosen by the values
    this.wanted = null; // quantity of layers; null: the usual one
    this.follow = true;
    this.failures = [];
    this.layouts = {}; // of the figures before any zoom
    this.parts = layOut(root, {
      save: (id, title, format) => this.save(id, title, format),
      reset: (id) => this.reset(id),
      openTable: () => this.fillTable(),
      saveJudgment: () => this.judgment.save(),
    });
    this.judgment = new JudgmentCard(source.judge, this.parts.judgment);
  }

  // Data ------------------------------------------------------------------------------------------------------------

  /** List the runs, load selected runs that have changed, and draw them. */
  async refresh() {
    if (this.busy) return;
    this.busy = true;
    try {
      const { runs } = await this.source.runs();
      this.listed = runs.flatMap((one) =>
        Object.entries(one.names).map(([name, series]) => ({
          key: JSON.stringify([one.run, name]), run: one.run, name, color: one.color, stamp: JSON.stringify(series),
        }))
      );
      this.selectNew();
      this.failures = [];
      const changed = await this.load();
      if (changed || !this.drawn) await this.show();
    } catch (error) {
      this.failures = [`The runs cannot be read: ${error.message}`];
      this.showProblems();
    } finally {
      this.busy = false;
    }
  }

  /** Show new runs as long as there are few. */
  selectNew() {
    for (const { key } of this.listed) {
      if (!this.known.has(key) && this.selected.size < AT_FIRST) this.selected.add(key);
      this.known.add(key);
    }
  }

  async load() {
    const wanted = this.listed.filter((one) => this.selected.has(one.key) && this.loaded.get(one.key)?.stamp !== one.stamp);
    await Promise.all(
      wanted.map(async (one) => {
        try {
          const found = await this.source.load(one.run, one.name);
          this.loaded.set(one.key, { ...found, ...one, run: this.nameOf(one) });
        } catch (error) {
          this.failures.push(`${one.run}: ${error.message}`);
        }
      })
    );
    return wanted.length > 0;
  }

  /** Return the name of a run, with that of the callback if the run has several. */
  nameOf({ run, name }) {
    return this.listed.filter((other) => other.run === run).length > 1 ? `${run} (${name})` : run;
  }

  /** The selected runs that have records. */
  get runs() {
    return this.listed.map((one) => this.loaded.get(one.key)).filter((run) => run && this.selected.has(run.key) && run.records.length);
  }

  get detailed() {
    return this.runs.find((run) => run.key === this.detail) ?? this.runs[0] ?? null;
  }

  /** The chosen record: of that step, or the last. */
  get record() {
    const run = this.detailed;
    return run ? (run.records.find((r) => r.global_step === this.step) ?? run.records.at(-1)) : null;
  }

  /** The quantity of layers that is shown; null: the run knows nothing of layers. */
  get quantity() {
    return quantityOf(this.detailed, this.wanted);
  }

  get thresholds() {
    return this.record?.thresholds ?? THRESHOLDS;
  }

  get logarithmic() {
    if (this.scale) return this.scale === "log";
    const middle = median(this.runs.flatMap((run) => column(run, ofSpectrum("c_t"))));
    return middle !== null && middle < 0 && middle > -SMALL;
  }

  // Choices ---------------------------------------------------------------------------------------------------------

  setTheme(theme) {
    this.theme = theme;
    if (this.drawn) this.draw();
  }

  async select(key, chosen) {
    if (chosen) this.selected.add(key);
    else this.selected.delete(key);
    await this.load();
    await this.show();
  }

  setDetail(key) {
    this.detail = key;
    this.step = null;
    this.show();
  }

  /** Move to another record; the figures of all runs stay as they are. */
  choose(step) {
    this.step = step;
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => {
      this.pending = null;
      this.showSlider();
      this.drawRecord();
    });
  }

  // Showing ---------------------------------------------------------------------------------------------------------

  /** Show everything anew. */
  async show() {
    const { empty, runs } = this.parts;
    empty.hidden = this.listed.length > 0;
    runs.hidden = this.listed.length === 0;
    this.parts.content.hidden = this.runs.length === 0;
    this.showRuns();
    this.showProblems();
    if (this.runs.length) {
      this.showTools();
      this.showDetailTools();
      this.fillTable();
      this.parts.findings.replaceChildren(...this.runs.map((run) => findingsOf(run, this.runs.length === 1)));
      await this.draw();
      this.judgment.setRuns(this.runs); // after the figures, which must not wait for it
    }
    this.drawn = true;
  }

  showProblems() {
    const said = [...this.failures, ...[...this.loaded.values()].filter((run) => this.selected.has(run.key))
      .flatMap((run) => several(run.problems).map((problem) => `${run.run}, ${problem}`))];
    this.parts.problems.replaceChildren(...said.map((text) => element("p", { class: "problem", role: "alert" }, text)));
  }

  showRuns() {
    const focused = document.activeElement?.dataset?.key; // the focus must survive
    const boxes = this.listed.map((one) =>
      element("label", { class: "run" },
        element("input", { type: "checkbox", checked: this.selected.has(one.key), "data-key": one.key,
          onchange: (event) => this.select(one.key, event.target.checked) }),
        element("span", { class: `swatch ${SYMBOLS[one.color % SYMBOLS.length]}`, style: `background:${colorOf(this.theme, one.color)}`, "aria-hidden": "true" }),
        this.nameOf(one))
    );
    this.parts.runs.replaceChildren(element("legend", {}, "Runs"), ...boxes);
    if (focused) boxes.map((box) => box.firstChild).find((box) => box.dataset.key === focused)?.focus();
  }

  showTools() {
    const scales = [["linear", "linear"], ["log", "logarithmic"]];
    const follow = element("input", { type: "checkbox", checked: this.follow, onchange: (event) => (this.follow = event.target.checked) });
    keepFocus(this.parts.tools, [
      menu("Axis of C_t", scales, this.logarithmic ? "log" : "linear", (value) => { this.scale = value; this.draw(); }),
      this.source.live ? element("label", { class: "control" }, follow, "Follow the training") : null,
      this.source.live ? button("Reload", "Reload the data now", () => this.refresh()) : null,
      button("CSV", "Save the data table as CSV", () => download("hesd.csv", toCsv(tableOf(this.runs)), "text/csv")),
      button("JSON", "Save all data as JSON", () => download("hesd.json", JSON.stringify(this.runs.map(exported)), "application/json")),
    ]);
  }

  showDetailTools() {
    const run = this.detailed;
    this.slider = element("input", { type: "range", id: "epoch", min: 0, max: run.records.length - 1, step: 1,
      oninput: (event) => this.choose(run.records[Number(event.target.value)].global_step) });
    this.shown = element("output", { for: "epoch" });
    const runs = this.runs.map((one) => [one.key, one.run]);
    const quantities = quantitiesOf(run).map(({ key, title }) => [key, title]);
    keepFocus(this.parts.detailTools, [
      menu("Run", runs, run.key, (key) => this.setDetail(key)),
      element("label", { class: "control wide" }, element("span", {}, "Analyzed state"), this.slider, this.shown),
      quantities.length ? menu("Layers by", quantities, this.quantity, (value) => { this.wanted = value; this.drawDetail(); }) : null,
    ]);
    this.showSlider();
  }

  showSlider() {
    const text = when(this.record, axisOf([this.detailed]));
    this.slider.value = this.detailed.records.indexOf(this.record);
    this.slider.setAttribute("aria-valuetext", text);
    this.shown.textContent = text;
  }

  /** Fill the table when it is open, because a long one takes time. */
  fillTable() {
    const { table: details } = this.parts;
    if (!details.open) return;
    const { head, rows } = tableOf(this.runs);
    const place = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Data table" },
      table("Records of the selected runs; undefined values are left out. Eigenvalues are in units of the loss per squared parameter.", head, rows));
    details.replaceChildren(details.firstElementChild, place);
  }

  // Drawing ---------------------------------------------------------------------------------------------------------

  async draw() {
    const began = performance.now();
    if (!this.runs.length) return;
    const { runs, theme } = this;
    const assessed = runs.some((run) => run.records.some((r) => r.assessment));
    const drawn = [
      this.plot("ct", ctFigure(runs, theme, this.logarithmic, this.thresholds.c_t), summary("C_t", runs, ofSpectrum("c_t"))),
      this.plot("extremes", extremesFigure(runs, theme), summary("Largest eigenvalue", runs, ofSpectrum("lambda_max"))),
      assessed
        ? this.plot("deltas", deltasFigure(runs, theme, this.thresholds), summary("Δr_e", runs, (r) => r.delta_r_e))
        : this.absent("deltas", "No generalization data were analyzed: pass generalization_dataloader=... to HessianSpectrumCallback."),
      this.plot("loss", lossFigure(runs, theme), summary("Training loss", runs, ofSpectrum("loss"))),
      this.drawDetail(),
    ];
    await Promise.all(drawn);
    performance.measure("hesd draw", { start: began });
    this.root.dataset.drawn = String(Number(this.root.dataset.drawn ?? 0) + 1);
  }

  /** Draw the figures of one run. */
  async drawDetail() {
    const { detailed: run, record, theme } = this;
    const text = run.run;
    this.parts.picks.replaceChildren(...run.rules.map(pickOf));
    const has = finite(column(run, ofSpectrum("lambda_max"))).length > 0;
    const { quantity } = this;
    await Promise.all([
      has ? this.plot("map", mapFigure(run, theme, "spectrum", record), `Spectral density over training, ${text}.`)
        : this.absent("map", "There is no spectrum on the training data."),
      this.drawChosen(),
      quantity ? this.plot("layers", layersFigure(run, theme, quantity, record), `${scalarOf(run, "layers", quantity).title} of layers, ${text}.`)
        : this.absent("layers", "No layers were analyzed: pass layers=\"auto\" to HessianSpectrumCallback, or keep a Krylov basis (not basis=\"none\")."),
    ]);
  }

  /** Draw the figures of one record; in the heat maps only the lines move. */
  async drawRecord() {
    const shapes = cursor(this.record, axisOf([this.detailed]));
    const maps = ["map", "layers"].map((id) => document.getElementById(id)).filter((node) => node.data);
    await Promise.all([...maps.map((node) => Plotly.relayout(node, { shapes })), this.drawChosen()]);
  }

  /** Draw the figures of the chosen record, and its assessment. */
  async drawChosen() {
    const { detailed: run, record, theme } = this;
    const axis = axisOf([run]);
    this.parts.assessment.replaceChildren(...assessmentOf(record, axis));
    this.parts.reference.replaceChildren(...referenceOf(record));
    const shown = `${run.run}, ${when(record, axis)}. Extremes and the number of negative eigenvalues are in the assessment.`;
    const missing = missingBand(record);
    const spectrum = spectrumOf(record);
    await Promise.all([
      record.spectra.spectrum || record.spectra.generalization
        ? this.plot("density", densityFigure(record, theme), `Spectral density, ${shown}`)
        : this.absent("density", "This analysis failed."),
      missing ? this.absent("cumulative", missing)
        : this.plot("cumulative", cumulativeFigure(record, theme), `Numbers of eigenvalues beyond thresholds, ${shown}`),
      spectrum?.losses_along ? this.plot("along", lossesAlongFigure(spectrum, theme), `Loss along the extreme eigenvectors, ${shown}`)
        : this.absent("along", spectrum ? NOT_ALONG : "This analysis failed."),
    ]);
    this.root.dataset.detail = `${run.key} ${record.global_step}`;
  }

  /** Draw a figure, and keep its zoom. */
  async plot(id, figure, label) {
    const node = document.getElementById(id);
    figure.layout.uirevision = OF_ONE_RUN.has(id) ? this.detailed.key : String(this.logarithmic);
    this.layouts[id] = figure.layout;
    if (!node.classList.contains("js-plotly-plot")) node.replaceChildren();
    node.classList.remove("absent");
    node.setAttribute("aria-label", label);
    const height = id === "layers" ? Math.min(120 + 18 * figure.data[0].y.length, 900) : null;
    node.style.height = height ? `${height}px` : "";
    await Plotly.react(node, figure.data, structuredClone(figure.layout), { displayModeBar: false, responsive: true, displaylogo: false });
    if (!node.hesd) {
      node.hesd = true;
      node.on("plotly_click", (event) => this.clicked(event.points[0]));
    }
  }

  /** Undo zoom and hidden curves. */
  reset(id) {
    const node = document.getElementById(id);
    if (node.data) Plotly.react(node, node.data, { ...structuredClone(this.layouts[id]), uirevision: Math.random() });
  }

  absent(id, text) {
    const node = document.getElementById(id);
    if (node.classList.contains("js-plotly-plot")) Plotly.purge(node);
    node.hesd = false;
    node.classList.add("absent");
    node.setAttribute("aria-label", text);
    node.style.height = "";
    node.replaceChildren(element("p", {}, text));
  }

  /** A click on a mark of a run, or on a heat map, chooses that state. */
  clicked(point) {
    const key = point.data.meta?.key;
    if (key && key !== this.detailed.key) this.setDetail(key);
    const run = this.detailed;
    const record = point.data.type === "heatmap" ? run.records.find((r) => r[axisOf([run]).key] === point.x) : null;
    const step = record?.global_step ?? (key ? point.customdata?.[1] : null);
    if (step !== null && step !== undefined) this.choose(step);
  }

  /** Save a figure with its title, which the page has outside the figure. */
  async save(id, title, format) {
    const node = document.getElementById(id);
    if (!node.data) return;
    const { clientWidth: width, clientHeight: height } = node;
    const text = OF_ONE_RUN.has(id) ? `${indexed(title)}, ${literal(this.detailed.run)}` : indexed(title);
    const layout = { ...node.layout, title: { text, font: { size: 14 }, x: 0.02 }, margin: { ...node.layout.margin, t: 76 } };
    const url = await Plotly.toImage({ data: node.data, layout }, { format, width, height: height + 60, scale: format === "png" ? 3 : 1 });
    download(`hesd-${id}.${format}`, url, null);
  }
}

/** Return why a record has no band of the numbers of eigenvalues; null if it has one. */
function missingBand(record) {
  const spectra = ["spectrum", "generalization"].map((field) => spectrumOf(record, field)).filter(Boolean);
  if (!spectra.length) return "This analysis failed.";
  if (spectra.some((spectrum) => spectrum.cumulative_band)) return null;
  if (spectra.every((spectrum) => spectrum.cumulative_band === undefined)) return "An earlier release wrote this record, without numbers of eigenvalues.";
  return `Nothing was computed: ${spectra[0].reason ?? "the products are not those of the loss"}.`;
}

/** Return at most a few of the problems, and how many there are beyond. */
function several(problems, most = 3) {
  const rest = problems.length - most;
  return rest > 0 ? [...problems.slice(0, most), `and ${rest} more problems`] : problems;
}

const exported = ({ run, name, records, rules, problems }) => ({ run, name, records, rules, problems });
