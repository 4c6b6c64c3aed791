/** What is not shown, and how to get it: a line below the cards in place of empty ones. */

import { element } from "./dom.js";

/** Show the card of a figure. */
export function present(node) {
  node.closest("figure").hidden = false;
  listAbsences(node);
}

/** Hide the card of a figure, and say why. */
export function hide(node, text) {
  node.closest("figure").hidden = true;
  node.replaceChildren(element("p", {}, text));
  listAbsences(node);
}

/** List the hidden figures of the section that a figure belongs to. */
function listAbsences(node) {
  const section = node.closest("section:not(.card)");
  const place = section.querySelector(":scope > .left-out") ?? section.appendChild(element("details", { class: "left-out" }));
  const hidden = [...section.querySelectorAll("figure[hidden]")];
  const lines = hidden.map((figure) => [figure.querySelector("h3").textContent, figure.querySelector(".plot").textContent]);
  if (place.dataset.said === JSON.stringify(lines)) return; // it stays open
  place.dataset.said = JSON.stringify(lines);
  place.hidden = !lines.length;
  place.replaceChildren(
    element("summary", {}, `Not shown: ${lines.map(([title]) => title).join(", ")}`),
    element("ul", {}, ...lines.map(([title, text]) => element("li", {}, element("strong", {}, title), `: ${text}`)))
  );
}
