/**
 * The class names that answers have while a task is active, and where transformers.js reads them. Part of `eigenlora/transformers`,
 * without an entry of its own.
 */

import type { PackView } from "../src/core/part.ts";
import type { Selection } from "../src/core/selection.ts";
import { bringsOf, parseBrought } from "../src/format/format.ts";
import { isIgnored } from "../src/session/match.ts";

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

/** The label names in a model's configuration. */
export class ConfigLabels {
  readonly #config: Record<string, unknown>;
  readonly #own: Readonly<Record<string, unknown>>;
  /** What each pack's task asks for, the latest last. */
  readonly #asked = new Map<object, Labels>();

  constructor(config: object) {
    this.#config = config as Record<string, unknown>;
    const { id2label, label2id, num_labels } = this.#config;
    this.#own = { id2label, label2id, num_labels };
  }

  /** @param pack on whose behalf; of several packs that have names, the latest switch tells */
  set(pack: object, asked: Labels): void {
    this.#asked.delete(pack);
    if (asked !== "base") this.#asked.set(pack, asked);
    const labels = [...this.#asked.values()].at(-1) ?? "base";
    const named = (names: readonly string[]): object => ({
      id2label: Object.fromEntries(names.entries()),
      label2id: Object.fromEntries(names.map((name, id) => [name, id])),
      num_labels: names.length,
    });
    // transformers.js says LABEL_0, LABEL_1, … where there are no names.
    const numbered = { id2label: undefined, label2id: undefined, num_labels: undefined };
    Object.assign(this.#config, labels === "base" ? this.#own : labels === "numbered" ? numbered : named(labels));
  }
}
