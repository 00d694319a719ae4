/**
 * Accuracies of adapters beside those of their heads alone: the paper leaves out adapters that add little to their head. Callers with
 * test rows measure the scores; this file reads them and splits the adapters.
 */
import { nearest } from "../arguments.ts";
import { AdapterError } from "../errors.ts";
import { show } from "../tensor/tensor-file.ts";
import type { Adapter } from "./adapter.ts";

/** Accuracy of an adapter with its head, and of that head alone with ΔW at zero; shares from 0 to 1. */
export interface AdapterScore {
  readonly accuracy: number;
  readonly headOnly: number;
}

/** Scores by the name of an adapter's folder, in groups; a file without groups is one. */
export type Scores = ReadonlyMap<string, ReadonlyMap<string, AdapterScore>>;

/** Tolerance for shares that are equal but for rounding: 0.12 − 0.1 is a little less than 0.02. */
const ROUNDING = 1e-9;

/**
 * Reads scores.json: `{ "folder": { "accuracy": 0.91, "accuracy_head_only": 0.62 }, … }`, or several of these by the name of a group, for
 * collections with adapters of the same names. Other fields are ignored.
 * @param json parsed
 * @param file its name, for messages
 * @throws AdapterError naming the entry and the field that is missing or no share
 */
export function readScores(json: unknown, file: string): Scores {
  const entries = fieldsOf(json, "", file);
  const flat = entries.every(([, entry]) => isObject(entry) && Object.values(entry).some((value) => !isObject(value)));
  const groups = flat ? [["", json] as const] : entries;
  return new Map(
    groups.map(([group, scores]) => [
      group,
      new Map(fieldsOf(scores, group, file).map(([name, entry]) => [name, scoreOf(entry, name, file)])),
    ]),
  );
}

/**
 * Splits adapters by what they gain over their own heads.
 * @param file of the scores, for messages
 * @returns those to keep, and those that gain less than `minGain`, with their gain; in the order of `adapters`
 * @throws AdapterError when an adapter has no score, or several groups have one and its folder names none of them
 * @throws RangeError when none is left
 * @example
 * const { kept } = partByGain(await readAdapters(["hub"]), readScores(JSON.parse(text), "scores.json"), 0.02, "scores.json");
 */
export function partByGain(
  adapters: readonly Adapter[],
  scores: Scores,
  minGain: number,
  file: string,
): { kept: Adapter[]; dropped: { id: string; gain: number }[] } {
  const unknown = adapters.filter((adapter) => groupsOf(adapter, scores).length === 0).map(nameOf);
  if (unknown.length > 0) {
    const close = nearest(
      unknown[0]!,
      [...scores.values()].flatMap((group) => [...group.keys()]),
    );
    throw new AdapterError(
      `no scores of ${unknown.length} of ${adapters.length} adapters: ${unknown.slice(0, 5).join(", ")}${unknown.length > 5 ? ", …" : ""}` +
        `${close.length > 0 ? ` (nearest: ${close[0]})` : ""}; add them by the names of their folders, or pack without these adapters`,
      { file, field: unknown[0]! },
    );
  }
  const kept: Adapter[] = [];
  const dropped: { id: string; gain: number }[] = [];
  for (const adapter of adapters) {
    const { accuracy, headOnly } = scoreFor(adapter, scores, file);
    const gain = accuracy - headOnly;
    if (gain < minGain - ROUNDING) dropped.push({ id: adapter.id, gain });
    else kept.push(adapter);
  }
  if (kept.length === 0) {
    const most = Math.max(...dropped.map(({ gain }) => gain));
    throw new RangeError(
      `none of ${adapters.length} adapters gains ${minGain} over its head; the most is ${most.toPrecision(3)}`,
    );
  }
  return { kept, dropped };
}

/** Name in the scores: that of the folder or file, since scores were measured before a task is renamed. */
const nameOf = ({ file }: Adapter): string => (segmentsOf(file).at(-1) ?? file).replace(/\.safetensors$/, "");

/** Segments of a path or address; a slash at the end is ignored. */
const segmentsOf = (file: string): string[] => file.split(/[/\\]/).filter((segment) => segment !== "");

const groupsOf = (adapter: Adapter, scores: Scores): string[] =>
  [...scores].filter(([, group]) => group.has(nameOf(adapter))).map(([name]) => name);

function scoreFor(adapter: Adapter, scores: Scores, file: string): AdapterScore {
  const groups = groupsOf(adapter, scores);
  const folder = segmentsOf(adapter.file).at(-2) ?? "";
  const group = groups.length === 1 ? groups[0]! : groups.find((name) => name === folder);
  if (group === undefined) {
    throw new AdapterError(
      `"${nameOf(adapter)}" is in the groups ${groups.join(", ")}, and its folder lies in "${folder}": give a file of one group, or call ` +
        "the folder like its group",
      { file, field: nameOf(adapter) },
    );
  }
  return scores.get(group)!.get(nameOf(adapter))!;
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function fieldsOf(value: unknown, name: string, file: string): [string, unknown][] {
  if (isObject(value) && Object.keys(value).length > 0) return Object.entries(value);
  const where = name === "" ? "it" : `"${name}"`;
  throw new AdapterError(
    `${where} is not an object of scores; expected { "adapter": { "accuracy": …, "accuracy_head_only": … } }`,
    {
      file,
      ...(name === "" ? {} : { field: name }),
    },
  );
}

function scoreOf(entry: unknown, name: string, file: string): AdapterScore {
  const share = (field: string, how: string): number => {
    const value = isObject(entry) ? entry[field] : undefined;
    if (value === undefined) throw new AdapterError(`"${name}" has no ${field}${how}`, { file, field: name });
    if (typeof value === "number" && value >= 0 && value <= 1) return value;
    throw new AdapterError(`${field} of "${name}" is ${show(value)}; expected a share from 0 to 1`, {
      file,
      field: name,
    });
  };
  return {
    accuracy: share("accuracy", ", the accuracy of the adapter with its head, from 0 to 1"),
    headOnly: share(
      "accuracy_head_only",
      ", the accuracy of its own head with LoRA off; measure it with switchTask({ TASK: 0 }), which brings the head and none of ΔW",
    ),
  };
}
