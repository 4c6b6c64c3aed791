/** Is a spectrum as those of similar networks were? The texts come with the record. */

import { minus } from "./base.js";
import { element, typeset } from "./dom.js";

const MEANING =
  "Usual: within the middle 80 % of these networks. Half of the healthy networks that we tried were beyond that in some quantity: “unusual” is no fault by itself, and “usual” proves nothing.";

/** Return how a record compares with the reference range. */
export function referenceOf({ reference }) {
  if (!reference.quantities) return [element("p", {}, "No comparison: the analysis failed.")];
  if (reference.reason) return [element("p", {}, `No comparison: ${reference.reason}.`)];
  const heads = ["", "answer", "here", "middle 80 %", "all"].map((title) => element("th", title ? { scope: "col" } : {}, title));
  return [
    element("p", {}, `Compared with ${reference.among}.`),
    element("div", { class: "rules", tabindex: "0", role: "region", "aria-label": "Comparison with similar networks" },
      element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...reference.quantities.map(comparedRow)))),
    element("p", { class: "why" }, `${MEANING} The networks: `, element("code", {}, reference.source), "."),
  ];
}

function comparedRow({ key, title, value, usual, seen, answer }) {
  const cell = (text) => element("td", { class: "number" }, minus(text) || "–");
  const isNoted = answer.startsWith("unusual") || answer.startsWith("outside");
  return element("tr", { "data-key": key }, element("th", { scope: "row" }, ...typeset(title)),
    element("td", { class: "number" }, isNoted ? element("strong", {}, answer) : answer), cell(value), cell(usual), cell(seen));
}
