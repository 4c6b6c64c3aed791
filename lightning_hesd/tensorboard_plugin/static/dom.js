/** Elements, tables and downloads. Text becomes text nodes only: names of runs and layers are of unknown origin. */

/**
 * Make an element. Attributes named `on...` are listeners; null and false leave an attribute out.
 * @param {string} tag
 * @param {Object<string, *>} attributes
 * @param {...(Node|string|null)} children
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== null && value !== false && value !== undefined) made.setAttribute(name, String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Return a text as nodes, with subscripts after underscores: C_t, λ_max. For texts of this page only. */
export function typeset(text) {
  return text.split(/(_[A-Za-z0-9]+)/).map((part) => (part.startsWith("_") ? element("sub", {}, part.slice(1)) : part));
}

/** Make a menu with a label in front; `choose` gets the value. */
export function menu(label, options, chosen, choose) {
  const entries = options.map(([value, text]) =>
    element("option", { value, selected: value === chosen }, text)
  );
  const select = element("select", { onchange: (event) => choose(event.target.value) }, ...entries);
  return element("label", { class: "control" }, element("span", {}, ...typeset(label)), select);
}

export function button(text, label, press) {
  return element("button", { type: "button", "aria-label": label, title: label, onclick: press }, text);
}

/** Put a text on the clipboard; return whether that worked. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false; // the page comes from another machine without encryption, or the browser forbids it
  }
}

/** Make a button that copies the text that `textOf` returns; where the browser forbids that, the text is shown to be copied. */
export function copyButton(text, label, textOf) {
  const made = button(text, label, async () => {
    const copied = textOf();
    if (await copy(copied)) made.textContent = "Copied";
    else window.prompt("Copy this link:", copied);
    setTimeout(() => (made.textContent = text), 1500);
  });
  return made;
}

/** Make a table; numbers are aligned to the right by style. */
export function table(caption, head, rows) {
  const cell = (value) =>
    element("td", typeof value === "number" ? { class: "number" } : {}, value === null ? "–" : shown(value));
  return element(
    "table",
    {},
    element("caption", {}, caption),
    element("thead", {}, element("tr", {}, ...head.map((title) => element("th", { scope: "col" }, title)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell))))
  );
}

const shown = (value) => (typeof value === "number" ? number(value) : String(value));

/** Write a number with a few digits and a true minus. */
export function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  const text =
    Number.isInteger(value) && size < 1e6
      ? String(value)
      : size !== 0 && (size < 1e-3 || size >= 1e5)
        ? value.toExponential(Math.max(digits - 2, 1))
        : String(Number(value.toPrecision(digits)));
  return text.replaceAll("-", "−");
}

/** Write the negative numbers of a text with a true minus; hyphens in names and exponents stay. */
export const withMinus = (text) => text.replace(/(?<![\w.-])-(?=\.?\d)/g, "−");

/** Replace the tools, and give the focus back to the one that had it. */
export function keepFocus(place, tools) {
  const inside = [...place.querySelectorAll("input, select, button")];
  const focused = inside.indexOf(document.activeElement);
  place.replaceChildren(...tools.filter(Boolean));
  if (focused >= 0) place.querySelectorAll("input, select, button")[focused]?.focus();
}

/** Let the browser save a text, or the content of a data URL. */
export function download(name, content, type) {
  const url = type ? URL.createObjectURL(new Blob([content], { type })) : content;
  const link = element("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  if (type) setTimeout(() => URL.revokeObjectURL(url), 1000);
}
