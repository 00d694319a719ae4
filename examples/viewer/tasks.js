/**
 * The tasks of a pack: a table of all, and what one of them says of itself.
 */
import { count, definitions, element, percent, section, size, table } from "./dom.js";

/**
 * @typedef {import("eigenlora").Pack} Pack
 * @typedef {import("eigenlora").TaskInfo} TaskInfo
 * @typedef {import("eigenlora").TaskMetadata} TaskMetadata
 */

/** Labels and names that are listed at most. */
const MOST_LISTED = 100;

/** Roles that name a module, in words. */
const OF_MODULES = new Map([
  ["own-A", "residual rows of A"],
  ["own-B", "residual rows of B"],
  ["private", "residual terms"],
  ["magnitude", "magnitudes (DoRA)"],
]);

/**
 * Says in a few words which parameters a task overrides.
 * @param {readonly string[] | undefined} brings as the directory lists it
 */
function overridesInWords(brings) {
  if (!brings) return "not said";
  /** @type {Map<string, number>} */
  const modules = new Map();
  const whole = [];
  for (const entry of brings) {
    const words = OF_MODULES.get(entry.slice(0, entry.indexOf(" ")));
    if (words) modules.set(words, (modules.get(words) ?? 0) + 1);
    else whole.push(entry);
  }
  const all = [...whole, ...Array.from(modules, ([words, n]) => `${words} in ${count(n, "module")}`)];
  return listed(all);
}

/** @param {readonly string[]} names */
function listed(names) {
  const more = names.length > MOST_LISTED ? ` and ${(names.length - MOST_LISTED).toLocaleString("en")} more` : "";
  return (names.slice(0, MOST_LISTED).join(", ") || "–") + more;
}

/**
 * @param {Pack} pack
 * @param {(id: string) => void} choose
 */
export function tasksTable(pack, choose) {
  const tasks = [...pack.tasks.values()];
  const licensed = tasks.some(({ metadata }) => metadata.license !== undefined);
  const rows = tasks.map(({ id, bytes, adapterBytes, metadata, brings }) => {
    const button = element("button", { type: "button", class: "plain" }, id);
    button.addEventListener("click", () => choose(id));
    const share = adapterBytes > 0 ? percent(bytes / adapterBytes) : "";
    const { labels, license } = metadata;
    const row = [button, size(bytes), share, labels?.length ?? "", overridesInWords(brings)];
    return licensed ? [...row, license ?? ""] : row;
  });
  const head = ["task", "bytes", "of its adapter", "labels", "overrides", ...(licensed ? ["licence"] : [])];
  return table("All tasks, in the order of the file", head, rows);
}

/**
 * Lists the metadata of a task.
 * @param {TaskMetadata} metadata
 * @returns {[name: string, value: string][]}
 */
export function metadataOf(metadata) {
  return Object.entries(metadata).flatMap(([key, value]) => {
    if (value === undefined || value === null) return [];
    if (key === "labels") return [["labels", listed(/** @type {string[]} */ (value))]];
    return [[key, typeof value === "string" ? value : JSON.stringify(value)]];
  });
}

/** @param {TaskInfo} task */
export function taskDetails({ metadata, integrity, brings }) {
  return definitions([
    ...metadataOf(metadata),
    ["overrides", overridesInWords(brings)],
    ["hash", integrity ?? "none in this pack"],
  ]);
}

/** @param {TaskMetadata} metadata */
export function metadataSection(metadata) {
  const entries = metadataOf(metadata);
  return section("Metadata", entries.length > 0 ? definitions(entries) : element("p", {}, "None."));
}
