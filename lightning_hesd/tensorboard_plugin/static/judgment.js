/** The card “Which rule picks best?”: the checkpoint rules, compared by a metric over the selected runs. */

import { toCsv } from "./data.js";
import { download, element, keepFocus, menu, withMinus } from "./dom.js";

const NO_METRICS =
  "The records of these runs have no metrics of trained weights. Log one in validation, for example self.log(\"val_acc\", ...), and " +
  "train again. Values that were computed later can be compared by lightning-hesd judge RUNS --metric NAME --metrics-csv FILE.";
const HELD_OUT = new Set(["val", "valid", "validation", "dev", "test"]);
const ACCURACY = new Set(["acc", "accuracy"]);

/** The card; it asks for a comparison when it is visible, and once for each selection, metric and state of the data. */
export class JudgmentCard {
  /**
   * @param {function({run: string, name: string}[], string): Promise<Object>} judge Returns what the route /judgment does.
   * @param {Object<string, HTMLElement>} parts The `card`, and in it `tools`, `sentence`, `remarks` and `rules`.
   */
  constructor(judge, parts) {
    this.judge = judge;
    this.parts = parts;
    this.runs = [];
    this.wanted = null; // chosen metric; null: the usual one
    this.selection = null; // of which the answers are: the runs, and what changes when they get records
    this.answers = new Map(); // by metric
    this.asked = null; // metric that is shown or being asked for
    this.isVisible = false;
    new IntersectionObserver((entries) => {
      this.isVisible = entries.at(-1).isIntersecting;
      this.update();
    }).observe(parts.card);
    addEventListener("beforeprint", () => { // what is printed is seen; a report has its answers and needs no time
      this.isVisible = true;
      this.update();
    });
  }

  /** Take the selected runs. */
  setRuns(runs) {
    this.runs = runs;
    const selection = JSON.stringify(runs.map(({ key, stamp }) => [key, stamp]));
    if (selection !== this.selection) {
      this.selection = selection;
      this.answers.clear();
      this.asked = null;
      this.markBusy(true);
    }
    const names = metricsOf(runs);
    keepFocus(this.parts.tools, [
      names.length ? menu("Metric", names.map((name) => [name, name]), this.metric, (name) => { this.wanted = name; this.update(); }) : null,
    ]);
    this.update();
  }

  /** The metric to compare by; null: the runs have none. */
  get metric() {
    return metricOf(metricsOf(this.runs), this.wanted);
  }

  async update() {
    const { metric, selection } = this;
    if (!this.isVisible || !this.runs.length || (metric !== null && metric === this.asked)) return;
    if (metric === null) {
      this.say(NO_METRICS);
      return;
    }
    this.asked = metric;
    const isCurrent = () => this.asked === metric && this.selection === selection;
    this.markBusy(true);
    try {
      const [runs] = trainingsOf(this.runs);
      const found = this.answers.get(metric) ?? await this.judge(runs.map(({ key }) => nameIn(key)), metric);
      if (!isCurrent()) return;
      this.answers.set(metric, found);
      this.show(found);
    } catch (error) {
      if (!isCurrent()) return;
      this.asked = null; // to be tried again
      this.say(`The rules cannot be compared: ${error.message}`);
    }
  }

  /** Mark what is shown as that of an earlier choice. It stays until the answer is there, or else the page would jump. */
  markBusy(isBusy) {
    this.parts.card.setAttribute("aria-busy", String(isBusy));
  }

  /** Show a text in place of a comparison. */
  say(text) {
    this.markBusy(false);
    this.parts.sentence.textContent = text;
    this.parts.sentence.classList.add("absent");
    this.parts.remarks.replaceChildren();
    this.parts.rules.replaceChildren();
  }

  show({ metric, mode, sentence, remarks, summary }) {
    const [, others] = trainingsOf(this.runs);
    const notes = [
      `${mode === "max" ? "Higher" : "Lower"} ${metric} counts as better.`, ...remarks,
      ...(others.length ? [`Left out, since other callbacks of the same runs are compared: ${others.map(({ run }) => run).join(", ")}.`] : []),
    ];
    this.markBusy(false);
    this.parts.sentence.textContent = withMinus(sentence);
    this.parts.sentence.classList.remove("absent");
    this.parts.remarks.replaceChildren(element("summary", {}, "Remarks"), element("ul", {}, ...notes.map((note) => element("li", {}, withMinus(note)))));
    this.parts.rules.replaceChildren(tableOfTexts(summary));
  }

  /** Save all numbers of the comparison that is shown. */
  save() {
    const rows = this.answers.get(this.asked)?.table;
    if (rows) download("hesd-rules.csv", toCsv({ head: Object.keys(rows[0]), rows: rows.map(Object.values) }), "text/csv");
  }
}

/** Return the names of the metrics that the runs have of trained weights. */
function metricsOf(runs) {
  const records = runs.flatMap((run) => run.records).filter(({ epoch }) => epoch >= 0);
  const known = records.flatMap(({ metrics }) => Object.entries(metrics)).filter(([, value]) => value !== null);
  return [...new Set(known.map(([name]) => name))].sort();
}

/** Return the wanted metric where there is one; else an accuracy on held-out data, any metric on such data, or the first. */
function metricOf(names, wanted) {
  if (names.includes(wanted)) return wanted;
  const isHeldOut = (name) => wordsIn(name).some((word) => HELD_OUT.has(word));
  const isAccuracy = (name) => wordsIn(name).some((word) => ACCURACY.has(word));
  return names.find((name) => isHeldOut(name) && isAccuracy(name)) ?? names.find(isHeldOut) ?? names[0] ?? null;
}

const wordsIn = (name) => name.replace(/([a-z])([A-Z])/g, "$1 $2").toLowerCase().match(/[a-z0-9]+/g) ?? [];

function nameIn(key) {
  const [run, name] = JSON.parse(key);
  return { run, name };
}

/** Return the runs with each training once, and the others: several callbacks of a run see the same training. */
function trainingsOf(runs) {
  const names = runs.map(({ key }) => nameIn(key).run);
  const isFirst = (_, place) => names.indexOf(names[place]) === place;
  return [runs.filter(isFirst), runs.filter((run, place) => !isFirst(run, place))];
}

/** Make a table of texts; an empty row separates groups. */
function tableOfTexts({ title, header, rows }) {
  const groups = [[]];
  for (const row of rows) {
    if (row.length) groups.at(-1).push(row);
    else groups.push([]);
  }
  const line = ([name, ...cells]) => element("tr", {}, element("th", { scope: "row" }, name), ...cells.map((cell) => element("td", { class: "number" }, withMinus(cell))));
  return element("table", {},
    element("caption", {}, title),
    element("thead", {}, element("tr", {}, ...header.map((name) => element(name ? "th" : "td", name ? { scope: "col" } : {}, name)))),
    ...groups.map((group) => element("tbody", {}, ...group.map(line))));
}
