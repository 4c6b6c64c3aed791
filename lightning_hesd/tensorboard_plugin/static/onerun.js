/** The figures of one run, and of its chosen record. */

import { axisOf, when } from "./axis.js";
import { column, finite, ofSpectrum, scalarOf, spectrumOf } from "./data.js";
import { cumulativeFigure, cursor, densityFigure, layersFigure, lossesAlongFigure, mapFigure } from "./details.js";
import { assessmentOf, pickOf } from "./words.js";

export const OF_ONE_RUN = ["map", "density", "cumulative", "along", "layers"];
const OVER_TRAINING = ["map", "layers"];
const NOT_ALONG =
  "The loss was not evaluated along eigenvectors: pass loss_along_eigenvectors=True to HessianSpectrumCallback, with a Krylov basis (not basis=\"none\").";

export class OneRun {
  /**
   * @param {Figures} figures
   * @param {{assessment: HTMLElement, picks: HTMLElement}} parts
   * @param {HTMLElement} root Its `data-detail` says what is drawn.
   */
  constructor(figures, parts, root) {
    this.figures = figures;
    this.parts = parts;
    this.root = root;
  }

  /**
   * Draw all.
   * @param {{run: Run, record: Object, theme: Object, quantity: ?string, by: string}} shown `quantity` of layers; `by` is the
   *   horizontal axis.
   */
  async draw(shown) {
    const { run, record, theme, quantity, by } = shown;
    const { figures } = this;
    const axis = axisOf([run], by);
    this.parts.picks.replaceChildren(...run.rules.map(pickOf));
    const has = finite(column(run, ofSpectrum("lambda_max"))).length > 0;
    const [wide, text] = [quantity ? layersFigure(run, theme, quantity, record, axis) : null, run.run];
    await Promise.all([
      has ? figures.plot("map", mapFigure(run, theme, "spectrum", record, axis), `Spectral density over training, ${text}.`, axis)
        : figures.absent("map", "There is no spectrum on the training data."),
      this.drawChosen(shown),
      wide ? figures.plot("layers", { ...wide, height: Math.min(120 + 18 * wide.data[0].y.length, 900) }, `${scalarOf(run, "layers", quantity).title} of layers, ${text}.`, axis)
        : figures.absent("layers", "No layers were analyzed: pass layers=\"auto\" to HessianSpectrumCallback, or keep a Krylov basis (not basis=\"none\")."),
    ]);
  }

  /** Draw the figures of another record; in the heat maps only the line moves. */
  async move(shown) {
    const shapes = cursor(shown.record, axisOf([shown.run], shown.by));
    await Promise.all([...OVER_TRAINING.map((id) => this.figures.mark(id, shapes)), this.drawChosen(shown)]);
  }

  /** Draw the figures of the chosen record, and its assessment. */
  async drawChosen({ run, record, theme, by }) {
    const { figures } = this;
    const axis = axisOf([run], by);
    this.parts.assessment.replaceChildren(...assessmentOf(record, axis));
    const shown = `${run.run}, ${when(record, axis)}. Extremes and the number of negative eigenvalues are in the assessment.`;
    const missing = missingBand(record);
    const spectrum = spectrumOf(record);
    await Promise.all([
      record.spectra.spectrum || record.spectra.generalization
        ? figures.plot("density", densityFigure(record, theme), `Spectral density, ${shown}`)
        : figures.absent("density", "This analysis failed."),
      missing ? figures.absent("cumulative", missing)
        : figures.plot("cumulative", cumulativeFigure(record, theme), `Numbers of eigenvalues beyond thresholds, ${shown}`),
      spectrum?.losses_along ? figures.plot("along", lossesAlongFigure(spectrum, theme), `Loss along the extreme eigenvectors, ${shown}`)
        : figures.absent("along", spectrum ? NOT_ALONG : "This analysis failed."),
    ]);
    this.root.dataset.detail = `${run.key} ${record.global_step}`;
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
