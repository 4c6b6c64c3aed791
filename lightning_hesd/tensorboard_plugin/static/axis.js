/** The horizontal axis of figures over training: epochs, optimizer steps or time. */

import { extent } from "./data.js";

const TITLES = { epoch: "epoch", global_step: "optimizer step" };
const UNITS = [["seconds", "s", 1], ["minutes", "min", 60], ["hours", "h", 3600]];
const SPACE = 0.08; // of the axis, that the text "start" takes

/** Note when each record of a run was written, counted from the first one, as what JSON and tables leave out. */
export function noteTimes(run) {
  const times = run.wall_times ?? [];
  run.records.forEach((record, index) => {
    for (const [key, , seconds] of UNITS)
      if (times.length) Object.defineProperty(record, key, { value: (times[index] - times[0]) / seconds, configurable: true });
  });
}

export const hasTimes = (runs) => runs.some((run) => run.wall_times?.length);

/**
 * Return the horizontal axis of runs: `key` is the field of a record that is its place.
 * @param {Run[]} runs
 * @param {string} by "epoch", "step" or "time"; "": epochs, or steps where an epoch has several records
 */
export function axisOf(runs, by = "") {
  const clash = runs.some((run) => new Set(run.records.map((r) => r.epoch)).size < run.records.length);
  const kind = by || (clash ? "step" : "epoch");
  const says = kind === "step" || (kind === "time" && clash) ? "global_step" : "epoch"; // what names a record
  const [key, title] = kind === "time" ? timeOf(runs) : [says, TITLES[says]];
  const [low, high] = extent(runs.flatMap((run) => run.records.map((r) => r[key])));
  const margin = (high - low) * 0.03 || 0.5;
  const axis = { kind, key, says, short: kind === "time" ? "time" : kind, title, range: [low - margin, high + margin], hasStart: key === "epoch" && low < 0 };
  return { ...axis, layout: { title, ...axisTicks(axis, axis.range) } };
}

function timeOf(runs) {
  const [, most] = extent(runs.flatMap((run) => run.records.map((r) => r.seconds ?? null)));
  const [key, unit] = UNITS.findLast(([, , seconds]) => most > 3 * seconds) ?? UNITS[0];
  return [key, `time since the first analysis (${unit})`];
}

/** Return the ticks within a range: whole epochs, and "start" for the analysis before the first step. */
export function axisTicks(axis, [low, high]) {
  if (axis.key !== "epoch") return {};
  const step = roundStep((high - low) / 8);
  const places = [];
  for (let place = Math.max(Math.ceil(low / step) * step, 0); place <= high; place += step) places.push(place);
  if (!axis.hasStart || low > -1) return { tickvals: places, ticktext: places.map(String) };
  const kept = places.filter((place) => place + 1 > SPACE * (high - low));
  return { tickvals: [-1, ...kept], ticktext: ["start", ...kept.map(String)] };
}

/** Return the next larger of 1, 2, 5, 10, 20, ... */
function roundStep(least) {
  const power = 10 ** Math.floor(Math.log10(Math.max(least, 1)));
  return [1, 2, 5, 10].map((multiple) => multiple * power).find((step) => step >= least);
}

/** Name a record. */
export function when(record, axis) {
  if (record.epoch < 0) return "start";
  return axis.says === "epoch" ? `epoch ${record.epoch}` : `step ${record.global_step} (epoch ${record.epoch})`;
}
