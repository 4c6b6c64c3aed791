/** The charts of all selected runs over training. */

import { chartsOf } from "./charts.js";
import { chartFigure, chosenLine } from "./curves.js";
import { keepFocus, menu } from "./dom.js";
import { ValueCard } from "./values.js";
import { summary } from "./words.js";

export const CHARTS = ["ct", "extremes", "deltas", "loss", "metric"];
const SCALES = [["linear", "linear"], ["log", "log"]];
const THRESHOLDS = { c_t: -0.6, delta_r_e: 1.5, delta_k_h05: 1.2 }; // without a record, which has them

export class AllRuns {
  /**
   * @param {Figures} figures
   * @param {HTMLElement} root
   * @param {function(string, string)} setScale Gets the id of a chart, and "linear" or "log".
   */
  constructor(figures, root, setScale) {
    this.figures = figures;
    this.setScale = setScale;
    this.values = new ValueCard(root);
    this.drawn = {}; // by id of a chart: what it shows
  }

  /**
   * Draw the charts.
   * @param {{runs: Run[], members: Object[], chosen: Object, axis: Object, theme: Object, scales: Object<string, string>}} shown
   *   `members` are the runs or groups of them; `chosen` is the record to mark.
   */
  async draw({ runs, members, chosen, axis, theme, scales }) {
    this.drawn = {};
    this.values.hide();
    await Promise.all(chartsOf(runs, chosen.thresholds ?? THRESHOLDS).map((chart) => {
      const { id } = chart;
      if (chart.missing) return this.figures.absent(id, chart.missing);
      const logarithmic = (scales[id] ?? (chart.isLogarithmic ? "log" : "linear")) === "log";
      const { lines, ...figure } = chartFigure(chart, { members, axis, theme, logarithmic, chosen });
      this.drawn[id] = { chart, lines, axis, theme };
      keepFocus(document.getElementById(`${id}-tools`), [menu("Scale", SCALES, logarithmic ? "log" : "linear", (scale) => this.setScale(id, scale))]);
      return this.figures.plot(id, figure, summary(chart.label, runs, chart.quantities[0].valuesOf), axis);
    }));
  }

  /** Move the line at the chosen record. */
  async mark(chosen) {
    await Promise.all(Object.entries(this.drawn).map(([id, { axis, theme }]) => this.figures.mark(id, chosenLine(chosen, axis, theme))));
  }

  /** Let a run or group stand out; null: none. */
  emphasize(key) {
    this.figures.emphasize(CHARTS, key);
  }

  /** Show the values of all runs where the pointer is. */
  hover(id, points, event) {
    const found = points?.filter(({ data }) => data.meta?.key) ?? [];
    if (!found.length || !this.drawn[id]) {
      this.values.hide();
      return;
    }
    const nearest = nearestOf(found, event);
    this.values.show(this.drawn[id], nearest.x, nearest.data.meta.key, event);
  }
}

/** Return the point that is nearest to the pointer; Plotly gives those of all curves at one place. */
export function nearestOf(points, event) {
  const top = event?.target.closest?.(".plot")?.getBoundingClientRect().top ?? 0;
  const distance = ({ yaxis, y }) => (event && yaxis?.d2p ? Math.abs(yaxis._offset + yaxis.d2p(y) - (event.clientY - top)) : 0);
  return points.reduce((best, point) => (distance(point) < distance(best) ? point : best));
}
