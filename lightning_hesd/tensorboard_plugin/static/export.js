/** Export of a figure for a paper or a slide: in the light theme, with a title, as PNG, SVG or PDF, or as Python code. */

import { when } from "./axis.js";
import { indexed, literal } from "./base.js";
import { button, copy, download, element, menu, typeset } from "./dom.js";
import { codeOf, runsOf } from "./figure_code.js";
import { LIGHT, faint } from "./theme.js";

const PIXELS = 96; // of CSS in an inch
const POINTS_OF_INCH = 72;
const DRAWN_FONT = 12; // pixels of the text of figures; all is scaled with it
const LETTER = 6.6; // width of a letter of that size, in pixels
const HEAD = 46; // height of the title, in pixels

/** Sizes in inches, of the text in points, and of a PNG in dots per inch. */
export const SIZES = {
  column: { title: "one column, 3.4 in", inches: [3.4, 2.75], points: 7.5, dots: 600, code: [3.4, 2.6] },
  page: { title: "two columns, 7 in", inches: [7, 3.9], points: 8.5, dots: 600, code: [7, 3.9] },
  slide: { title: "slide, 16:9", inches: [40 / 3, 7.5], points: 20, dots: 192, code: [6.67, 3.75] },
};

let lastSize = "column"; // of the last export

// Figures -----------------------------------------------------------------------------------------------------------

/**
 * Return a figure in the light theme. Its parts have the colors of the theme that it was drawn in; those of data are the
 * same in both.
 */
function inLight(value, theme) {
  if (theme === LIGHT) return value;
  const light = new Map(Object.keys(LIGHT).flatMap((name) => [LIGHT[name]].flat().map((color, i) => [[theme[name]].flat()[i], color])));
  const hexadecimal = (numbers) => `#${numbers.slice(0, 3).map((n) => Number(n).toString(16).padStart(2, "0")).join("")}`;
  const recolored = (text) => {
    if (light.has(text)) return light.get(text);
    const numbers = text.startsWith("rgba(") ? text.match(/[\d.]+/g) : [];
    const solid = light.get(hexadecimal(numbers));
    return numbers.length === 4 && solid ? faint(solid, numbers[3]) : text;
  };
  const walk = (part) => {
    if (typeof part === "string") return recolored(part);
    if (Array.isArray(part)) return typeof part[0] === "number" ? part : part.map(walk);
    if (part === null || typeof part !== "object" || ArrayBuffer.isView(part)) return part;
    return Object.fromEntries(Object.entries(part).map(([key, entry]) => [key, walk(entry)]));
  };
  return walk(value);
}

/** Return what is drawn of a figure, without what only a pointer shows. */
const still = ({ data, layout }) => ({
  data: data.filter(({ visible }) => visible !== "legendonly").map(({ customdata, hovertemplate, ...trace }) => trace),
  layout: { ...layout, uirevision: undefined, width: undefined, height: undefined },
});

/** Return a size with the pixels to lay a figure out in, and the factor that brings them to the size. */
function sizeOf(shown, key) {
  const { points, inches: [width, least], ...more } = SIZES[key];
  const usual = ((points / POINTS_OF_INCH) * PIXELS) / DRAWN_FONT;
  const needed = shown.id === "layers" ? 130 + 15 * shown.figure.data[0].y.length : 0; // each layer has its name beside it
  const scale = key === "slide" ? Math.min(usual, (least * PIXELS) / (needed || 1)) : usual;
  const height = Math.max(least, (needed * scale) / PIXELS);
  return { ...more, scale, inches: [width, height], pixels: [width, height].map((inches) => (inches * PIXELS) / scale) };
}

/** Return the figure with its title above the legend. */
async function laidOut(shown, size) {
  const [width, height] = size.pixels;
  const { data, layout: drawn } = inLight(still(shown.figure), shown.theme);
  const letters = Math.floor((width - 20) / LETTER);
  const [xaxis, yaxis] = [[drawn.xaxis, width - 120], [drawn.yaxis, height / 2]].map(([axis, room]) => wrapped(axis, room / LETTER));
  const layout = {
    ...drawn, width, height, xaxis, yaxis,
    showlegend: true, // the page has legends of its own
    shapes: (drawn.shapes ?? []).filter(({ name }) => !name?.startsWith("chosen")),
    margin: { ...drawn.margin, l: drawn.margin.l + (yaxis.title.text.includes("<br>") ? 14 : 0) },
  };
  const above = HEAD + 6 + (await legendHeight(data, layout));
  const text = `${indexed(literal(shortened(shown.title, letters)))}<br><span style="font-size:11px">${literal(shortened(placeOf(shown), letters))}</span>`;
  const title = { text, font: { size: 13 }, x: 0, xref: "container", xanchor: "left", y: 1, yref: "container", yanchor: "top", pad: { l: 10, t: 20 } };
  return { data, layout: { ...layout, title, margin: { ...layout.margin, t: Math.max(layout.margin.t, above) } } };
}

/** Return an axis whose title has at most so many letters in a line. */
function wrapped(axis, letters) {
  const { text = "" } = axis.title ?? {};
  const isLong = text.replace(/<[^>]*>/g, "").length > letters;
  return { ...axis, title: { ...axis.title, text: isLong ? text.replace(" (", "<br>(") : text, font: { size: DRAWN_FONT } } };
}

/** Return the height that the legend takes above the axes, in pixels. */
async function legendHeight(data, layout) {
  const node = element("div", { style: "position: fixed; left: -9999px; top: 0" });
  document.body.append(node);
  await Plotly.newPlot(node, data, structuredClone(layout), { staticPlot: true });
  const height = node.querySelector(".legend")?.getBoundingClientRect().height ?? 0;
  Plotly.purge(node);
  node.remove();
  return height;
}

const shortened = (text, letters) => (text.length > letters ? `${text.slice(0, letters - 1)}…` : text);

/** Return the figure as an SVG of the size in inches. */
async function svgOf(shown, size) {
  const [width, height] = size.pixels;
  const url = await Plotly.toImage(await laidOut(shown, size), { format: "svg", width, height });
  const svg = new DOMParser().parseFromString(decodeURIComponent(url.slice(url.indexOf(",") + 1)), "image/svg+xml").documentElement;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("width", `${size.inches[0]}in`);
  svg.setAttribute("height", `${size.inches[1]}in`);
  return svg;
}

const textOf = (svg) => new XMLSerializer().serializeToString(svg);

// Names -------------------------------------------------------------------------------------------------------------

/** Return runs and epochs of a figure in words. */
function placeOf({ runs, record, axis }) {
  const names = runs.length > 3 ? `${runs.length} runs` : runs.map(({ run }) => run).join(", ");
  return `${names}, ${record ? when(record, axis) : span(runs, axis)}`;
}

/** Return the first and the last epoch, or step, of runs. */
function span(runs, axis) {
  const records = runs.flatMap((run) => run.records).sort((a, b) => a[axis.says] - b[axis.says]);
  const name = (record) => (record.epoch < 0 ? "start" : String(record[axis.says]));
  const [first, last] = [records[0], records.at(-1)].map(name);
  const unit = axis.says === "epoch" ? "epoch" : "step";
  return first === last ? `${unit} ${last}` : `${unit}s ${first} to ${last}`;
}

/** Return the name of the file. */
function fileOf(shown, size, format) {
  const place = placeOf(shown).replace(/[^\p{L}\p{N}._]+/gu, "-").replace(/^-+/, "").slice(0, 120);
  return `hesd-${shown.id}-${place}-${size}.${format}`;
}

// Formats -----------------------------------------------------------------------------------------------------------

async function savePng(shown, key) {
  const size = sizeOf(shown, key);
  const [width, height] = size.pixels;
  const url = await Plotly.toImage(await laidOut(shown, size), { format: "png", width, height, scale: ((size.scale * size.dots) / PIXELS) * (1 + 1e-6) }); // rounded down
  download(fileOf(shown, key, "png"), url, null);
}

async function saveSvg(shown, key) {
  download(fileOf(shown, key, "svg"), textOf(await svgOf(shown, sizeOf(shown, key))), "image/svg+xml");
}

/**
 * Let the browser print the figure on a page of its size: “Save as PDF” keeps it vector graphics, and embeds the fonts.
 * No other way makes a PDF without a library of its own that would have to bring fonts along.
 */
async function savePdf(shown, key) {
  const size = sizeOf(shown, key);
  const [width, height] = size.inches.map((inches) => `${inches}in`);
  const sheet = element("div", { class: "sheet" });
  sheet.append(document.importNode(await svgOf(shown, size), true));
  const style = element("style", {}, `@page { size: ${width} ${height}; margin: 0; }`);
  const title = document.title;
  document.title = fileOf(shown, key, "pdf"); // which the browser proposes as the name of the file
  document.head.append(style);
  document.body.append(sheet);
  window.addEventListener("afterprint", () => {
    sheet.remove();
    style.remove();
    document.title = title;
  }, { once: true });
  window.print();
}

// The dialog --------------------------------------------------------------------------------------------------------

/**
 * Open the dialog that exports a figure.
 * @param {{id: string, title: string, figure: {data: Object[], layout: Object}, theme: Object, runs: Run[], record: ?Object,
 *   axis: Object, quantity: ?string, folderOf: function(string): Promise<string>}} shown The runs that the figure shows; its record, if it shows one.
 */
export async function openExport(shown) {
  const coded = { ...shown, runs: runsOf(shown) };
  const folders = await Promise.all(coded.runs.map(async ({ key, run }) => shown.folderOf(JSON.parse(key)[0]).catch(() => run)));
  const preview = element("div", { class: "preview" });
  const status = element("p", { role: "status" });
  const code = element("pre", { tabindex: "0" });
  const python = codeOf(coded, SIZES[lastSize].code, folders) === null ? null
    : element("details", {}, element("summary", {}, "Python code"), code);
  const say = (text) => { status.textContent = text; };
  const act = (work, done = "") => async () => {
    say("");
    try {
      say((await work(shown, lastSize)) ?? done);
    } catch (error) {
      say(`The figure cannot be exported: ${error.message}`);
    }
  };
  const show = act(async () => {
    if (python) code.textContent = codeOf(coded, SIZES[lastSize].code, folders);
    const image = element("img", { alt: `Preview of ${placeOf(shown)}` });
    image.src = URL.createObjectURL(new Blob([textOf(await svgOf(shown, sizeOf(shown, lastSize)))], { type: "image/svg+xml" }));
    image.onload = () => URL.revokeObjectURL(image.src);
    preview.replaceChildren(image);
  });
  const copyCode = async () => {
    if (await copy(code.textContent)) return "The code is on the clipboard.";
    python.open = true;
    getSelection().selectAllChildren(code);
    return "The browser forbids the clipboard: the code is selected below.";
  };
  const dialog = element("dialog", { class: "export-dialog", "aria-labelledby": "export-title", onclose: () => dialog.remove() },
    element("div", { class: "head" }, element("h3", { id: "export-title" }, ...typeset(`Export: ${shown.title}`)),
      button("Close", "Close", () => dialog.close())),
    preview,
    element("div", { class: "tools" },
      menu("Size", Object.entries(SIZES).map(([key, { title }]) => [key, title]), lastSize, (key) => { lastSize = key; show(); }),
      button("PNG", "Save as PNG", act(savePng)),
      button("SVG", "Save as SVG", act(saveSvg)),
      button("PDF", "Print on a page of this size: choose “Save as PDF”", act(savePdf, "Choose “Save as PDF” in the print dialog.")),
      python && button("Copy Python", "Copy code that draws the figure with lightning_hesd", act(copyCode))),
    status, python);
  document.body.append(dialog);
  dialog.showModal();
  await show();
}
