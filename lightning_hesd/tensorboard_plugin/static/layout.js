/** The structure of the page. */

import { button, element, typeset } from "./dom.js";

const EMPTY = `from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_hesd import HessianSpectrumCallback

Trainer(logger=TensorBoardLogger("runs"), callbacks=[HessianSpectrumCallback()])`;

/**
 * Put the parts of the page into `root` and return those that are filled later.
 * @param {HTMLElement} root
 * @param {{exportFigure: function(string, string), reset: function(string), openTable: function(), saveJudgment: function()}} actions
 */
export function layOut(root, actions) {
  const parts = {
    problems: element("div", { id: "problems" }, element("p", { role: "status" }, "Loading …")),
    empty: emptyState(),
    runs: element("fieldset", { id: "runs", hidden: true }),
    nothing: element("p", { id: "nothing", class: "note", role: "status", hidden: true }),
    tools: element("div", { class: "tools", id: "tools" }),
    detailTools: element("section", { class: "bar", id: "detail-tools", "aria-label": "Chosen state" }),
    assessment: element("div", { id: "assessment", "aria-live": "polite" }),
    state: element("div", { id: "state" }),
    reference: element("div", { id: "reference" }),
    findings: element("div", { id: "findings" }),
    picks: element("ul", { id: "picks" }),
    table: element("details", { id: "table", ontoggle: actions.openTable }, element("summary", {}, "Data table")),
  };
  parts.judgment = judgmentCard(actions);
  const figure = (...given) => figureCard(actions, ...given);
  const charts = grid(
    figure("ct", "C_t with its interval",
      "Ratio of the extreme negative and positive eigenvalue (training data). Band: Lanczos interval, without sampling error; bars: total error, where the sampling error is known."),
    figure("extremes", "Extreme eigenvalues", "Of the Hessian of the training loss."),
    figure("deltas", "Generalization criteria", "Ratios of r_e and K_H05 on generalization and training data."),
    figure("loss", "Loss", "Mean loss over the analysis samples."),
    figure("metric", "Training metric", "That of the checkpoint rule."));
  const details = grid(
    figure("density", "Density at the chosen state",
      "Ticks: quadrature nodes; vertical lines: extremes; pale band: where the density of the true eigenvalues lies, smoothed alike, with the confidence of the interval, if no eigenvalue occurs several times.", "wide"),
    titled("h3", "state", "Numbers at the chosen state", { class: "card" }, parts.state),
    figure("map", "Density over training", "Spectral mass per bin, training data; lines: λ_max and λ_min."),
    figure("cumulative", "Eigenvalues beyond thresholds",
      "At the chosen state: below negative thresholds, above positive ones. Lines: by the density; bands: bounds on the true numbers, if no eigenvalue occurs several times."),
    figure("along", "Loss along the extreme eigenvectors",
      "At the chosen state, training data. Dashed: the parabolas L + st + λt²/2 that the loss follows near t = 0."),
    titled("h3", "assessment", "Criteria for generalization", { class: "card" }, parts.assessment),
    titled("h3", "picks", "Picks of the checkpoint rules", { class: "card" }, parts.picks),
    titled("h3", "reference", "Is this usual?", { class: "card wide" }, parts.reference),
    figure("layers", "Layers over training", "Of the Hessian of each layer's own parameters, training data. Columns reach halfway to the neighboring analyses. Point at a layer for all that is known of it.", "wide"));
  // The bar is a child of the content, so that it stays in sight in both sections.
  parts.content = element("div", { id: "content", hidden: true },
    titled("h2", "all", "Runs over training", {},
      parts.tools, titled("h3", "findings", "Findings", { class: "card" }, parts.findings), charts, parts.judgment.card),
    parts.detailTools,
    titled("h2", "detail", "One run in detail", {}, details),
    parts.table);
  const columns = element("div", { class: "columns" }, parts.runs, element("div", { class: "charts" }, parts.nothing, parts.content));
  root.replaceChildren(element("main", { class: "page" }, element("h1", {}, "Hessian eigenvalue spectral density"), parts.problems, parts.empty, columns));
  return parts;
}

const NARROWEST = 400; // pixels of a card
const GAP = 14;

/** Make a grid of cards whose rows are all full, also when some cards have nothing to show. */
function grid(...cards) {
  const made = element("div", { class: "grid" }, ...cards);
  const balance = () => balanceRows(made);
  new ResizeObserver(balance).observe(made);
  cards.forEach((card) => new MutationObserver(balance).observe(card.querySelector(".plot") ?? card, { attributeFilter: ["class"] }));
  return made;
}

function balanceRows(place) {
  const cards = [...place.children].filter((card) => !card.matches(".wide, :has(.absent)"));
  const most = Math.max(Math.floor((place.clientWidth + GAP) / (NARROWEST + GAP)), 1);
  rowsOf(cards.length, most).forEach((size, row, sizes) => {
    const first = sizes.slice(0, row).reduce((sum, other) => sum + other, 0);
    for (const card of cards.slice(first, first + size)) card.style.setProperty("--in-row", size);
  });
}

/** Return the numbers of cards in rows that are as equal as possible, the longer ones first. */
function rowsOf(cards, most) {
  const rows = Math.ceil(cards / most);
  return Array.from({ length: rows }, (_, row) => Math.ceil((cards - row) / rows));
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
  const card = element("section", { class: "card judged", "aria-labelledby": "judgment-title" }, head, parts.tools, body, element("p", { class: "why" }, caption));
  return { ...parts, card };
}

/** Make the card of a figure: title, buttons, the figure, and a caption. */
function figureCard({ exportFigure, reset }, id, title, caption, more = "") {
  const tools = element("span", { class: "export" },
    button("Export", `Export “${title}” as PNG, SVG, PDF or Python code`, () => exportFigure(id, title)),
    button("Reset", `Reset the zoom of “${title}”`, () => reset(id)));
  return element(
    "figure",
    { class: `card ${more}`, "aria-labelledby": `${id}-title` },
    element("div", { class: "head" }, element("h3", { id: `${id}-title` }, ...typeset(title)), element("span", { class: "own", id: `${id}-tools` }), tools),
    element("div", { class: "keys", id: `${id}-keys`, "aria-hidden": "true" }),
    element("div", { id, class: "plot", role: "img" }),
    element("figcaption", {}, ...typeset(caption))
  );
}
