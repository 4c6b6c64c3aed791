/** The report: data are in the page itself, compressed. The modules come before this one in the same script. */

import { start } from "./page.js";

const PAPER = 680; // pixels between the margins of A4

const compressed = Uint8Array.from(atob(document.getElementById("hesd-data").textContent), (letter) => letter.charCodeAt(0));
const inlined = await new Response(new Blob([compressed]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
const load = async (run, name) => inlined.runs.find((one) => one.run === run && one.name === name);
start(
  {
    runs: async () => ({ runs: inlined.runs.map(({ run, color, name }) => ({ run, color, names: { [name]: {} } })) }),
    load,
    loadBrief: load,
    judge: async (runs, metric) => {
      const found = inlined.judgments[metric];
      if (found.error) throw new Error(found.error);
      const all = new Set(inlined.runs.map(({ run }) => run)).size;
      return runs.length < all ? { ...found, sentence: `All ${all} runs of the report are compared, not only the selected ones. ${found.sentence}` } : found;
    },
    folderOf: async (run) => inlined.runs.find((one) => one.run === run).folder ?? run,
    live: null,
  },
  document.getElementById("hesd")
);

/** Give figures the width of the paper, or of their cards again; printing does not wait, so that all is done at once. */
function fitTo(width) {
  for (const node of document.querySelectorAll(".js-plotly-plot")) Plotly.relayout(node, width ? { width, autosize: false } : { width: null, autosize: true });
}

window.addEventListener("beforeprint", () => {
  if (document.querySelector("body > .sheet")) return; // a single figure, which is as wide as it must be
  for (const details of document.querySelectorAll("#findings details")) details.open = true;
  fitTo(PAPER);
});
window.addEventListener("afterprint", () => fitTo(null));
