/** The runs that the source lists, those that are selected, and the data of these. */

import { isIn, selectionOf } from "./address.js";
import { noteTimes } from "./axis.js";
import { patternOf } from "./grouping.js";

const AT_FIRST = 10; // runs that are selected at first

export class RunStore {
  /**
   * @param {{runs: function(): Promise<Object>, load: function(string, string): Promise<Object>, loadBrief: function(string, string): Promise<Object>}} source
   *   `loadBrief` returns runs without what only the figures of one run need.
   */
  constructor(source) {
    this.source = source;
    this.listed = []; // {key, run, name, color, stamp}
    this.loaded = new Map(); // key -> Run, with `isWhole`
    this.selected = new Set(); // keys
    this.known = new Set(); // keys of runs that were listed before
    this.loading = 0; // how many runs are on their way
    this.failures = []; // messages
  }

  /** List the runs; new ones are selected as `selection` says, and without it as long as there are few. */
  async list(selection) {
    this.failures = [];
    const { runs } = await this.source.runs();
    this.listed = runs.flatMap((one) =>
      Object.entries(one.names).map(([name, series]) => ({
        key: JSON.stringify([one.run, name]), run: one.run, name, color: one.color, stamp: JSON.stringify(series),
      }))
    );
    this.selectNew(selection);
  }

  selectNew(selection) {
    for (const { key } of this.listed) {
      if (!this.known.has(key) && isIn(selection, key, this.selected.size < AT_FIRST)) this.selected.add(key);
      this.known.add(key);
    }
  }

  /** Take a selection in place of the present one. */
  selectAnew(selection) {
    this.known.clear();
    this.selected.clear();
    this.selectNew(selection);
  }

  /** Select runs or not, and return what is selected now. */
  select(keys, chosen) {
    for (const key of keys) this.selected[chosen ? "add" : "delete"](key);
    return selectionOf(this.listed.map(({ key }) => key), this.selected);
  }

  /** The selected runs that are not loaded as they are now. */
  get wanted() {
    return this.listed.filter((one) => this.selected.has(one.key) && this.loaded.get(one.key)?.stamp !== one.stamp);
  }

  /** Load what is wanted: the run with this key as a whole, the others in brief. */
  async load(wholeKey) {
    const { wanted } = this;
    this.loading += wanted.length;
    await Promise.all(wanted.map((one) => this.fetch(one, one.key === wholeKey)));
    this.loading -= wanted.length;
  }

  /** Load runs that are loaded in brief as a whole, and return them. */
  async whole(keys) {
    const isBrief = ({ key }) => keys.includes(key) && this.loaded.get(key)?.isWhole === false;
    await Promise.all(this.listed.filter(isBrief).map((one) => this.fetch(one, true)));
    return keys.map((key) => this.loaded.get(key)).filter((run) => run?.isWhole);
  }

  /** Load a run; a failure becomes a message. */
  async fetch(one, isWhole) {
    try {
      const { load, loadBrief } = this.source;
      const run = { ...(await (isWhole ? load : loadBrief)(one.run, one.name)), ...one, run: this.nameOf(one), isWhole };
      noteTimes(run);
      this.loaded.set(one.key, run);
    } catch (error) {
      this.failures.push(`${one.run}: ${error.message}`);
    }
  }

  /** Return the name of a run, with that of the callback if the run has several. */
  nameOf({ run, name }) {
    return this.listed.filter((other) => other.run === run).length > 1 ? `${run} (${name})` : run;
  }

  /** The selected runs that are loaded. */
  get present() {
    return this.listed.map((one) => this.loaded.get(one.key)).filter((run) => run && this.selected.has(run.key));
  }

  /** Return the selected runs that have records and that a filter leaves. */
  shownBy(filter) {
    const { pattern } = patternOf(filter);
    return this.present.filter((run) => run.records.length && (!pattern || pattern.test(run.run)));
  }

  /** Return the key of the first selected run that a filter leaves, null without one. */
  firstOf(filter) {
    const { pattern } = patternOf(filter);
    return this.listed.find((one) => this.selected.has(one.key) && (!pattern || pattern.test(this.nameOf(one))))?.key ?? null;
  }

  /** Return messages about what is not shown. */
  get problems() {
    return [...this.failures, ...this.present.flatMap((run) => several(run.problems).map((problem) => `${run.run}, ${problem}`))];
  }

  /** Return why no run is shown though there are some. */
  get whyNothing() {
    if (!this.selected.size) return "No run is selected. Select one in the list.";
    if (this.shownBy("").length) return "The filter leaves no selected run. Change it, or select one of the runs that it leaves.";
    return "The selected runs have no record that can be shown.";
  }
}

/** Return at most a few of the problems, and how many there are beyond. */
function several(problems, most = 3) {
  const rest = problems.length - most;
  return rest > 0 ? [...problems.slice(0, most), `and ${rest} more problems`] : problems;
}
