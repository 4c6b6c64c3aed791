/** The structure of the page. */

import { button, element, typeset } from "./dom.js";

const EMPTY = `from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_hesd import HessianSpectrumCallback

Trainer(logger=TensorBoardLogger("runs"), callbacks=[HessianSpectrumCallback()])`;

/**
 * Put the parts of the page into `root` and return those that are filled later.
 * @param {HTMLElement} root
 * @param {{save: function(string, string, string), reset: function(string), openTable: function(), saveJudgment: function()}} actions
 */
export function layOut(root, actions) {
  const parts = {
    problems: element("div", { id: "problems" }, element("p", { role: "status" }, "Loading …")),
    empty: emptyState(),
    runs: element("fieldset", { id: "runs", hidden: true }),
    tools: element("div", { class: "tools", id: "tools" }),
    detailTools: element("div", { class: "tools", id: "detail-tools" }),
    reference: element("div", { id: "reference" }),
    assessment: element("div", { id: "assessment", "aria-live": "polite" }),
    findings: element("div", { id: "findings" }),
    picks: element("ul", { id: "picks" }),
    table: element("details", { id: "table", ontoggle: actions.openTable }, element("summary", {}, "Data table")),
  };
  parts.judgment = judgmentCard(actions);
  const figure = (...given) => figureCard(actions, ...given);
  parts.content = element(
    "div",
    { id: "content", hidden: true },
    titled("h2", "all", "Runs over training", {},
      parts.tools,
      element("div", { class: "grid paired" },
        titled("h3", "findings", "Findings", { class: "card wide" }, parts.findings),
        figure("ct", "C_t with its interval", "Ratio of the extreme negative and positive eigenvalue (training data)."),
        figure("extremes", "Extreme eigenvalues", "Of the Hessian of the training loss."),
        figure("deltas", "Generalization criteria", "Ratios of r_e and K_H05 on generalization and training data."),
        figure("loss", "Loss and metric", "Mean loss over the analysis samples, and the checkpoint rule's metric."),
        parts.judgment.card)),
    titled("h2", "detail", "One run in detail", {},
      parts.detailTools,
      element("div", { class: "grid" },
        figure("map", "Density over training", "Spectral mass per bin, training data; lines: λ_max and λ_min."),
        figure("density", "Density at the chosen state", "Ticks: quadrature nodes; vertical lines: extremes."),
        figure("cumulative", "Eigenvalues beyond thresholds",
          "At the chosen state: below negative thresholds, above positive ones. Lines: by the density; bands: bounds on the true numbers, if no eigenvalue occurs several times."),
        figure("along", "Loss along the extreme eigenvectors",
          "At the chosen state, training data. Dashed: the parabolas L + st + λt²/2 that the loss follows near t = 0."),
        titled("h3", "reference", "Is this usual?", { class: "card wide" }, parts.reference),
        titled("h3", "assessment", "Criteria for generalization", { class: "card" }, parts.assessment),
        titled("h3", "picks", "Picks of the checkpoint rules", { class: "card" }, parts.picks),
        figure("layers", "Layers over training", "Of the Hessian of each layer's own parameters, training data. Point at a layer for all that is known of it.", "wide"))),
    parts.table
  );
  const title = element("h1", {}, "Hessian eigenvalue spectral density");
  root.replaceChildren(element("main", { class: "page" }, title, parts.problems, parts.empty, parts.runs, parts.content));
  return parts;
}

/** Make a section with a heading that names it. */
function titled(level, id, title, attributes, ...children) {
  return element("section", { ...attributes, "aria-labelledby": `${id}-title` }, element(level, { id: `${id}-title` }, title), ...children);
}

function emptyState() {
  const what =
    "HessianSpectrumCallback writes the data of this tab through TensorBoardLogger. Add it to the Trainer, and start " +
    "TensorBoard with the logger's folder as --logdir. The first spectrum appears after the first epoch.";
  return titled("h2", "empty", "No spectra yet", { id: "empty", hidden: true }, element("p", {}, what), element("pre", { tabindex: "0" }, EMPTY));
}

/** Make the card of the comparison of the rules; its parts are filled later. */
function judgmentCard({ saveJudgment }) {
  const parts = {
    tools: element("div", { class: "tools", id: "judgment-tools" }),
    sentence: element("p", { class: "sentence absent", role: "status" }, "Comparing …"),
    remarks: element("details"),
    rules: element("div", { class: "rules" }),
  };
  const save = element("span", { class: "export" }, button("CSV", "Save the comparison of the rules as CSV", saveJudgment));
  const head = element("div", { class: "head" }, element("h3", { id: "judgment-title" }, "Which rule picks best?"), save);
  const caption = "Each rule picks one analyzed epoch of every selected run; the metric of its picks is compared with that of the last epoch.";
  const body = element("div", { id: "judgment" }, element("div", {}, parts.sentence, parts.remarks), parts.rules);
  const card = element("section", { class: "card wide", "aria-labelledby": "judgment-title" }, head, parts.tools, body, element("p", { class: "why" }, caption));
  return { ...parts, card };
}

/** Make the card of a figure: title, buttons to save it, the figure, and a caption. */
function figureCard({ save, reset }, id, title, caption, more = "") {
  const tools = element("span", { class: "export" },
    button("PNG", `Save “${title}” as PNG`, () => save(id, title, "png")),
    button("SVG", `Save “${title}” as SVG`, () => save(id, title, "svg")),
    button("Reset", `Reset the zoom of “${title}”`, () => reset(id)));
  return element(
    "figure",
    { class: `card ${more}`, "aria-labelledby": `${id}-title` },
    element("div", { class: "head" }, element("h3", { id: `${id}-title` }, ...typeset(title)), tools),
    element("div", { id, class: "plot", role: "img" }),
    element("figcaption", {}, ...typeset(caption))
  );
}
