/** Colors, for light and dark. Those with a meaning are of Okabe & Ito (2008): color-blind readers tell them apart. */

export const LIGHT = {
  dark: false,
  text: "#202124",
  muted: "#5f6368",
  grid: "#e3e5e8",
  paper: "#ffffff",
  training: "#0072b2",
  generalization: "#d55e00",
  preconditioned: "#a2578a",
  ggn: "#008060",
  residual: "#9a7000",
  pins: ["#a2578a", "#008060", "#9a7000", "#5f6368", "#c0392b", "#3c78d8"],
  positive: "rgba(0, 114, 178, 0.07)",
  negative: "rgba(213, 94, 0, 0.09)",
  // TensorBoard's own, in the order in which it gives them to runs.
  runs: ["#425066", "#12b5cb", "#e52592", "#f9ab00", "#9334e6", "#7cb342", "#e8710a"],
};

const DARK = {
  dark: true,
  text: "#e8eaed",
  muted: "#a9aeb4",
  grid: "#44474c",
  paper: "#2b2c2f",
  training: "#56b4e9",
  generalization: "#f0944d",
  preconditioned: "#e39ac9",
  ggn: "#34c99d",
  residual: "#e8c14a",
  pins: ["#e39ac9", "#34c99d", "#e8c14a", "#b8bdc4", "#ff8f80", "#9bb8ff"],
  positive: "rgba(86, 180, 233, 0.10)",
  negative: "rgba(240, 148, 77, 0.12)",
  runs: ["#8e98a3", "#12b5cb", "#e52592", "#f9ab00", "#9334e6", "#7cb342", "#e8710a"],
};

/** Marks also tell runs apart. They are ten, and the colors seven, so that 70 runs differ in one or the other. */
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "triangle-left", "triangle-right", "hourglass"];

export const LOW_TO_HIGH = "Viridis";

export function colorOf(theme, index) {
  return theme.runs[index % theme.runs.length];
}

export const symbolOf = (index) => SYMBOLS[index % SYMBOLS.length];

/** Return the color with the given opacity. */
export function faint(color, opacity) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
  return `rgba(${red}, ${green}, ${blue}, ${opacity})`;
}

/** Call back with the theme, now and whenever it changes: TensorBoard's where the page is a tab, else the system's. */
export function watchTheme(callback) {
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const host = hostBody();
  let isPrinting = false;
  const update = () => {
    const dark = !isPrinting && (host ? host.classList.contains("dark-mode") : system.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    callback(dark ? DARK : LIGHT);
  };
  if (host) new MutationObserver(update).observe(host, { attributeFilter: ["class"] });
  else system.addEventListener("change", update);
  for (const [event, printing] of [["beforeprint", true], ["afterprint", false]])
    window.addEventListener(event, () => {
      isPrinting = printing; // on paper everything is light
      update();
    });
  update();
}

/** Return the body of TensorBoard's page if this one is embedded there. */
function hostBody() {
  try {
    return window.parent === window ? null : window.parent.document.body;
  } catch {
    return null; // embedded by somebody else
  }
}
