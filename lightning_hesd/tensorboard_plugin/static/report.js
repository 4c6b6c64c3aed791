/** The report: data are in the page itself, compressed. The modules come before this one in the same script. */

import { start } from "./page.js";

const compressed = Uint8Array.from(atob(document.getElementById("hesd-data").textContent), (letter) => letter.charCodeAt(0));
const inlined = await new Response(new Blob([compressed]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
start(
  {
    runs: async () => ({ runs: inlined.runs.map(({ run, color, name }) => ({ run, color, names: { [name]: {} } })) }),
    load: async (run, name) => inlined.runs.find((one) => one.run === run && one.name === name),
    loadBrief: async (run, name) => inlined.runs.find((one) => one.run === run && one.name === name),
    judge: async (runs, metric) => {
      if (runs.length < new Set(inlined.runs.map(({ run }) => run)).size) throw new Error("a report compares all of its runs. Select them all.");
      const found = inlined.judgments[metric];
      if (found.error) throw new Error(found.error);
      return found;
    },
    live: null,
  },
  document.getElementById("hesd")
);
