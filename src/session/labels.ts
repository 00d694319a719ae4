/**
 * The class names that answers have while a task is active. From the pack alone; no model here.
 */

import type { PackView } from "../core/part.ts";
import type { Selection } from "../core/selection.ts";
import { bringsOf, parseBrought } from "../format/format.ts";
import { isIgnored } from "./match.ts";

/** Names in the order of the head's rows; "numbered" for a head whose task has no names; "base" for the base's own. */
export type Labels = readonly string[] | "numbered" | "base";

/**
 * The names for a selection.
 * @param head whose head a blend uses; without it, heads were blended, which takes equal labels
 * @param ignore parameters of the tasks, or modules, that the model was made without
 * @throws as `Pack.load`, for tasks whose pack does not say what they bring
 */
export async function labelsOf(
  pack: PackView,
  selection: Selection,
  head: string | undefined,
  ignore: readonly string[] = [],
): Promise<Labels> {
  const { tasks } = pack;
  const active = typeof selection === "object" ? Object.keys(selection ?? {}) : [selection];
  let labels: Labels = "base";
  for (const id of head === undefined ? active : [head]) {
    const task = tasks.get(id);
    // The switch refuses it, in better words.
    if (!task) continue;
    const brings = task.brings ?? bringsOf(await pack.load(id), pack.modules);
    const saved = brings.map(parseBrought).filter(({ role }) => role === "saved");
    if (saved.some(({ name }) => !isIgnored(name, ignore))) return task.metadata.labels ?? "numbered";
    // Adapters without a head of their own were trained on the base's; its classes may mean something else to them.
    if (saved.length === 0 && labels === "base") labels = task.metadata.labels ?? "base";
  }
  return labels;
}
