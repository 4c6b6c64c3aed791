/** All records as a table, as CSV and as JSON. */

import { tableOf, toCsv } from "./data.js";
import { download, element, table } from "./dom.js";

const CAPTION = "Records of the selected runs; undefined values are left out. Eigenvalues are in units of the loss per squared parameter.";

/** Fill the table when it is open, because a long one takes time. */
export function fillTable(details, runs) {
  if (!details.open) return;
  const { head, rows } = tableOf(runs);
  const place = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Data table" }, table(CAPTION, head, rows));
  details.replaceChildren(details.firstElementChild, place);
}

export const saveCsv = (runs) => download("hesd.csv", toCsv(tableOf(runs)), "text/csv");

export function saveJson(runs) {
  const saved = runs.map(({ run, name, records, rules, problems }) => ({ run, name, records, rules, problems }));
  download("hesd.json", JSON.stringify(saved), "application/json");
}
