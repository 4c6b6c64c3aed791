/** The cards about the chosen state: densities, numbers of eigenvalues, losses along eigenvectors, numbers, criteria. */

import { when } from "./axis.js";
import { spectrumOf } from "./data.js";
import { DensityCard } from "./density.js";
import { cumulativeFigure, lossesAlongFigure } from "./details.js";
import { referenceOf } from "./reference.js";
import { stateOf } from "./state.js";
import { assessmentOf } from "./words.js";

const FAILED = "This analysis failed.";
const NOT_ALONG =
  "The loss was not evaluated along eigenvectors: pass loss_along_eigenvectors=True to HessianSpectrumCallback, with a Krylov basis (not basis=\"none\").";

export class ChosenState {
  /**
   * @param {Figures} figures
   * @param {{assessment: HTMLElement, reference: HTMLElement, state: HTMLElement}} parts
   */
  constructor(figures, parts) {
    this.figures = figures;
    this.parts = parts;
    this.density = new DensityCard(() => this.redrawDensity());
  }

  /**
   * Draw the cards.
   * @param {{run: Run, record: Object, others: Run[], theme: Object, axis: Object}} shown `others` are the other selected runs.
   */
  async draw(shown) {
    this.shown = shown;
    const { run, record, theme, axis } = shown;
    this.parts.assessment.replaceChildren(...assessmentOf(record, axis));
    this.parts.reference.replaceChildren(...referenceOf(record));
    this.parts.state.replaceChildren(...stateOf(record));
    this.parts.state.closest(".card").classList.toggle("wide", Object.keys(record.spectra).length > 2);
    const [spectrum, missing] = [spectrumOf(record), missingBand(record)];
    const title = `${run.run}, ${when(record, axis)}. The numbers of the chosen state are in a table of their own`;
    await Promise.all([
      this.drawDensity(),
      missing ? this.figures.absent("cumulative", missing)
        : this.figures.plot("cumulative", cumulativeFigure(record, theme), `Numbers of eigenvalues beyond thresholds, ${title}.`),
      spectrum?.losses_along ? this.figures.plot("along", lossesAlongFigure(spectrum, theme), `Loss along the extreme eigenvectors, ${title}.`)
        : this.figures.absent("along", spectrum ? NOT_ALONG : FAILED),
    ]);
  }

  /** Draw it after a choice that changes its axes, without a zoom. */
  redrawDensity() {
    this.figures.reset("density");
    return this.drawDensity();
  }

  async drawDensity() {
    const { run, record, axis } = this.shown;
    const figure = this.density.figure(this.shown);
    if (figure) await this.figures.plot("density", figure, `Spectral density, ${run.run}, ${when(record, axis)}. The numbers are in a table of their own.`);
    else this.figures.absent("density", FAILED);
  }
}

/** Return why a record has no band of the numbers of eigenvalues; null if it has one. */
function missingBand(record) {
  const spectra = ["spectrum", "generalization"].map((field) => spectrumOf(record, field)).filter(Boolean);
  if (!spectra.length) return FAILED;
  if (spectra.some((spectrum) => spectrum.cumulative_band)) return null;
  return `Nothing was computed: ${spectra[0].reason ?? "the products are not those of the loss"}.`;
}
