/** What the reader has chosen, kept in the address: a reload and a copied link restore it. */

const PREFIX = "p.hesd."; // TensorBoard's scheme for plugins, in its own address: #hesd&p.hesd.filter=...
const WRITE_MS = 150;
const COLORED_BY = "regex:"; // as TensorBoard writes it into its address

/**
 * The choices and what holds without them. `runs` is {only: keys} or {without: keys}, null: the first ones; `x` and `state` are
 * the horizontal axis and the global_step of the chosen record; `scales` and `zooms` are by chart; `spectra` are the fields of
 * those in the chart of densities, null: the first two; `order` is that of layers, "value" or "".
 */
const defaults = () => ({
  runs: null, filter: inherited("runFilter"), groups: colorGroups(), x: "", scales: {}, detail: "", state: null, layers: "", zooms: {},
  spectra: null, order: "",
});

const isText = (value) => typeof value === "string";
const isRange = (value) => Array.isArray(value) && value.length === 2 && value.every(Number.isFinite);
const all = (isGood) => (value) => value !== null && typeof value === "object" && !Array.isArray(value) && Object.values(value).every(isGood);
const isZoom = (value) => all(isRange)(value) && Object.keys(value).every((axis) => ["x", "y"].includes(axis));
const areKeys = (value) => Array.isArray(value) && value.every((key) => Array.isArray(key) && key.length === 2 && key.every(isText));

const CHECKS = {
  runs: (value) => all(areKeys)(value) && Boolean(value.only ?? value.without), filter: isText, groups: isText,
  x: (value) => ["epoch", "step", "time"].includes(value), scales: all((value) => ["linear", "log"].includes(value)),
  detail: isText, state: Number.isFinite, layers: isText, zooms: all(isZoom),
  spectra: (value) => Array.isArray(value) && value.every(isText), order: (value) => value === "value",
};

/** Return the window whose address the reader sees: TensorBoard's if the page is its tab, else this one. */
function host() {
  try {
    return window.parent !== window && window.parent.tensorboard ? window.parent : window;
  } catch {
    return window; // embedded by another site
  }
}

/** Return what TensorBoard's own address says, of its time series. */
const inherited = (name) => (host() === window ? "" : (new URLSearchParams(host().location.search).get(name) ?? ""));

function colorGroups() {
  const found = inherited("runColorGroup");
  return found.startsWith(COLORED_BY) ? found.slice(COLORED_BY.length) : "";
}

const parts = () => host().location.hash.slice(1).split("&");

/** Return the choices in the address. What is damaged in it is left out. */
export function readChoices() {
  const choices = defaults();
  for (const part of parts().filter((one) => one.startsWith(PREFIX))) {
    const [name, text] = part.slice(PREFIX.length).split("=");
    if (!Object.hasOwn(CHECKS, name)) continue;
    try {
      const decoded = decodeURIComponent(text);
      const value = isText(choices[name]) ? decoded : JSON.parse(decoded);
      if (CHECKS[name](value)) choices[name] = value;
    } catch {
      // a link that was cut off
    }
  }
  return choices;
}

/** Write the choices that differ from the defaults into the address, which makes no step in the browser's history. */
export function writeChoices(choices) {
  const given = Object.entries(defaults()).map(([name, usual]) => [name, encoded(choices[name]), encoded(usual)]).filter(([, now, usual]) => now !== usual);
  const others = parts().filter((part) => part && !part.startsWith(PREFIX));
  const own = given.map(([name, text]) => `${PREFIX}${name}=${encodeURIComponent(text)}`);
  const page = host();
  if (page !== window && (!others.length || others[0].includes("="))) others.unshift("hesd"); // TensorBoard's name of the tab
  const address = new URL(page.location.href);
  address.hash = [...others, ...own].join("&");
  if (address.href !== page.location.href) page.history.replaceState(page.history.state, "", address.href);
}

let writing = null;

/** Write the choices a moment after the last of several changes: browsers allow few changes of the address in a short time. */
export function writeSoon(choices) {
  clearTimeout(writing);
  writing = setTimeout(() => writeChoices(choices), WRITE_MS);
}

const encoded = (value) => (isText(value) ? value : JSON.stringify(value));

/** Call back when the address changes: by a link, or by hand. */
export function watchAddress(callback) {
  host().addEventListener("hashchange", callback);
}

export const link = () => host().location.href;

// Selections ----------------------------------------------------------------------------------------------------------

/** Return a selection of runs, by the shorter list: of those in it, or of the others. */
export function selectionOf(keys, selected) {
  const [only, without] = [keys.filter((key) => selected.has(key)), keys.filter((key) => !selected.has(key))];
  return only.length <= without.length ? { only: only.map((key) => JSON.parse(key)) } : { without: without.map((key) => JSON.parse(key)) };
}

/** Return whether a selection has a run; null has the first ones. */
export function isIn(selection, key, isFirst) {
  if (!selection) return isFirst;
  const listed = (selection.only ?? selection.without).some((one) => JSON.stringify(one) === key);
  return selection.only ? listed : !listed;
}
