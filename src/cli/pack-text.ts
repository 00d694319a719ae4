/**
 * What the command pack says of a pack that was made: its size, what was lost, what tasks share, what else was tried.
 */
import type { BuildReport, SharedReport } from "../pack/report.ts";
import type { SearchReport } from "../pack/search.ts";
import { VERSION } from "../version.ts";
import { bytes, count, mean, percent, range, sharing, smaller, table } from "./output.ts";

/** The report of a pack. */
export function reportText(file: string, report: BuildReport): string[] {
  const { errors, components, ratio, breakEvenTasks, shared, tasks } = report;
  const totals = errors.map(({ total }) => total);
  return [
    `${file}: ${count(report.tasks, "task")}, ${count(report.modules, "module")}, ${bytes(report.bytes)}`,
    ...table([
      ["", "adapters", "pack"],
      ["size", bytes(report.adapterBytes), `${bytes(report.bytes)} (${smaller(ratio)})`],
      ["ΔW error of a task, mean / largest", "0", `${percent(mean(totals))} / ${percent(Math.max(0, ...totals))}`],
      ...(shared
        ? [["one task, on average", bytes(report.adapterBytes / tasks), bytes((report.bytes - shared.bytes) / tasks)]]
        : [["components per side", "", components.max > 0 ? range(components.min, components.max) : "none"]]),
    ]),
    ...(shared ? sharedText(shared, report) : components.max > 0 ? [sharing(breakEvenTasks)] : []),
  ];
}

/** A line about a pack to paste into a model card, in Markdown. @param answers what is said of its answers, instead of ΔW */
export function cardText(report: BuildReport, baseModel: string | undefined, answers: string | undefined): string {
  const { tasks, bytes: size, ratio, errors } = report;
  const largest = Math.max(0, ...errors.map(({ total }) => total));
  const lost = answers ?? `the ΔW of each is off by ${percent(largest)} at most`;
  const what = `${count(tasks, "LoRA adapter")}${baseModel === undefined ? "" : ` of ${baseModel}`} in one file of ${bytes(size)}`;
  const by = `[eigenlora](https://www.npmjs.com/package/eigenlora) ${VERSION}`;
  return `For a model card: ${what} (${smaller(ratio)} than they are); ${lost}. Made with ${by}.`;
}

/** What tasks share, and what that saves. */
export function sharedText({ A, B, bytes: stored, saved }: SharedReport, { tasks, modules }: BuildReport): string[] {
  if (tasks === 1) return [];
  const side = (name: string, one: SharedReport["A"]): string[] =>
    one.tasks > 0 ? [`${name}, by ${one.tasks} of ${tasks} tasks in ${one.modules} of ${modules} modules`] : [];
  const sides = [...side("what layers read (A)", A), ...side("what they write (B)", B)];
  if (sides.length === 0)
    return ["Nothing is shared: no adapters are alike enough for that to save bytes. Each task is stored by itself."];
  return [`Shared: ${sides.join("; ")}. Stored once, that takes ${bytes(stored)} and saves ${bytes(saved)}.`];
}

/** What was decided, and what else was tried. */
export function autoText({ decisions, tried }: SearchReport): string[] {
  const rows = tried.map(({ name, bytes: size, error }) => [
    name,
    size === undefined ? "out of reach" : bytes(size),
    error === undefined ? "" : percent(error),
  ]);
  return [...decisions, ...(tried.length > 1 ? table([["tried", "size", "ΔW error"], ...rows]) : [])];
}
