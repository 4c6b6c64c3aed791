/** The tab: data come from TensorBoard's server. */

import { start } from "./page.js";

const LIVE_MS = 10000;

/** Load the style and Plotly, and draw; TensorBoard calls this. */
export async function render() {
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = place("style.css");
  document.documentElement.lang = "en";
  document.title = "HESD";
  document.head.append(style);
  const ready = script("plotly.min.js"); // data are loaded meanwhile
  await loaded(style);
  const source = {
    ready,
    runs: () => answer("runs"),
    load: (run, name) => answer("records", { run, name }),
    loadBrief: (run, name) => answer("records", { run, name, brief: 1 }),
    judge: (runs, metric) => answer("judgment", [["metric", metric], ...runs.flatMap(({ run, name }) => [["run", run], ["name", name]])]),
    folderOf: async (run) => {
      const { folder } = await answer("runs");
      return run === "." ? folder : folder ? `${folder.replace(/\/$/, "")}/${run}` : run;
    },
    live: LIVE_MS,
    onReload,
  };
  await start(source, document.body);
}

/** Call back when TensorBoard has reloaded its data, by its protocol for plugins. */
function onReload(callback) {
  if (window.parent === window) return;
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = ({ data }) => {
    const { type, id, isReply } = JSON.parse(data);
    if (isReply) return;
    port1.postMessage(JSON.stringify({ type, id, payload: null, error: null, isReply: true }));
    if (type === "experimental.DataReloaded") callback();
  };
  window.parent.postMessage("experimental.bootstrap", window.location.origin, [port2]);
}

const place = (name) => new URL(name, import.meta.url).href;

function script(name) {
  const made = document.createElement("script");
  made.src = place(name);
  document.head.append(made);
  return loaded(made);
}

function loaded(node) {
  return new Promise((resolve, reject) => {
    node.addEventListener("load", resolve);
    node.addEventListener("error", () => reject(new Error(`cannot load ${node.src ?? node.href}`)));
  });
}

async function answer(route, query = {}) {
  const response = await fetch(`${place(route)}?${new URLSearchParams(query)}`);
  const body = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
  if (!response.ok) throw new Error(body.error ?? `the server answered ${response.status}`);
  return body;
}
