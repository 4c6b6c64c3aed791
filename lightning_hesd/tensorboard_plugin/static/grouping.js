/** Patterns for names of runs, and groups of runs with their means. */

/** Return the regular expression of a text, and the reason if it is none. Without a text, everything matches. */
export function patternOf(text) {
  try {
    return { pattern: text ? new RegExp(text) : null, problem: null };
  } catch (error) {
    return { pattern: null, problem: `“${text}” is no regular expression: ${error.message.replace(/^.*: /, "")}.` };
  }
}

/**
 * Return the name of a run's group: what the pattern's groups capture, or else the name without what it matches.
 * A run that does not match stays by itself.
 */
export function groupName(name, pattern) {
  const found = pattern.exec(name);
  if (!found) return name;
  const rest = name.slice(0, found.index) + name.slice(found.index + found[0].length);
  const kept = found.length > 1 ? found.slice(1).filter(Boolean).join(" ") : rest.replace(/^[/_\-,. ]+|[/_\-,. ]+$/g, "");
  return kept || "all";
}

/** Return the groups of runs, in the order of their first runs: each with its place among them as its color. */
export function groupsOf(runs, pattern) {
  const groups = new Map();
  for (const run of runs) {
    const name = groupName(run.run, pattern);
    if (!groups.has(name)) groups.set(name, { key: `group:${name}`, run: name, color: groups.size, runs: [] });
    groups.get(name).runs.push(run);
  }
  return [...groups.values()];
}

/**
 * Return the mean over the runs of a group at each epoch or step: {x, y, low, high, counts}, where `low` and `high` are a standard
 * deviation away, null of a single run, and `counts` says how many runs have a value there.
 * @param {{runs: Run[]}} group
 * @param {{key: string, says: string}} axis Records at the same `says` are averaged, and drawn at the mean of `key`.
 * @param {function(Run): (?number)[]} valuesOf
 */
export function meanOf(group, axis, valuesOf) {
  const places = new Map();
  for (const run of group.runs)
    for (const [place, found] of lastAt(run, axis, valuesOf(run))) {
      if (!places.has(place)) places.set(place, []);
      places.get(place).push(found);
    }
  const sorted = [...places].sort(([a], [b]) => a - b);
  const columns = sorted.map(([place, found]) => ({ place, x: mean(found.map(([x]) => x)), ...momentsOf(found.map(([, value]) => value)) }));
  const pick = (key) => columns.map((column) => column[key]);
  return { places: pick("place"), x: pick("x"), y: pick("y"), low: pick("low"), high: pick("high"), counts: pick("count") };
}

/** Return [place on the axis, value] of the last record of a run at each epoch or step. */
function lastAt(run, axis, values) {
  const found = new Map();
  run.records.forEach((record, index) => {
    const value = values[index];
    if (value !== null && Number.isFinite(value)) found.set(record[axis.says], [record[axis.key], value]);
  });
  return found;
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function momentsOf(values) {
  const [y, count] = [mean(values), values.length];
  if (count < 2) return { y, low: null, high: null, count };
  const deviation = Math.sqrt(values.reduce((sum, value) => sum + (value - y) ** 2, 0) / (count - 1));
  return { y, low: y - deviation, high: y + deviation, count };
}
