/** The figures of one run, and of its chosen record. */

import { ChosenState } from "./chosen.js";
import { column, finite, ofSpectrum } from "./data.js";
import { cursor, mapFigure } from "./details.js";
import { LayersCard } from "./layers.js";
import { pickOf } from "./words.js";

export const OF_ONE_STATE = ["density", "cumulative", "along"];
export const OF_ONE_RUN = ["map", "layers", ...OF_ONE_STATE];

export class OneRun {
  /**
   * @param {Figures} figures
   * @param {{assessment: HTMLElement, state: HTMLElement, picks: HTMLElement}} parts
   * @param {HTMLElement} root Its `data-detail` says what is drawn.
   */
  constructor(figures, parts, root) {
    this.figures = figures;
    this.parts = parts;
    this.root = root;
    this.chosen = new ChosenState(figures, parts);
    this.layers = new LayersCard(figures);
  }

  /**
   * Draw all.
   * @param {{run: Run, record: Object, others: Run[], whole: function(Run[]): Promise<Run[]>, theme: Object, quantity: ?string,
   *   axis: Object, choices: Object, choose: function(Object)}} shown `others` are the other selected runs, which may be loaded
   *   in brief, `whole` loads them as a whole; `quantity` is that of layers; `choices` are those of the page, which `choose`
   *   changes.
   */
  async draw(shown) {
    const { run, record, theme, axis } = shown;
    this.parts.picks.replaceChildren(...run.rules.map(pickOf));
    const has = finite(column(run, ofSpectrum("lambda_max"))).length > 0;
    await Promise.all([
      has ? this.figures.plot("map", mapFigure(run, theme, record, axis), `Spectral density over training, ${run.run}.`, axis)
        : this.figures.absent("map", "There is no spectrum on the training data."),
      this.layers.draw(shown),
      this.drawChosen(shown),
    ]);
  }

  /** Draw what another record changes; in the heat maps only the line moves. */
  async move(shown) {
    const shapes = cursor(shown.record, shown.axis);
    const isSorted = shown.choices.order === "value"; // by values of the record
    await Promise.all([
      this.figures.mark("map", shapes),
      isSorted ? this.layers.draw(shown) : this.figures.mark("layers", shapes),
      this.drawChosen(shown),
    ]);
  }

  async drawChosen(shown) {
    this.latest = shown;
    await this.chosen.draw(shown);
    if (shown !== this.latest) return; // a drawing that began later may end earlier
    this.root.dataset.detail = `${shown.run.key} ${shown.record.global_step}`;
  }
}
