/**
 * Writes a canonical adapter as the two files that PEFT loads, with the same weights. Scales stay in B, so every module's alpha equals
 * its rank. Makes the contents only; the caller writes them.
 */

import { AdapterError } from "../errors.ts";
import { isHead } from "../format/heads.ts";
import type { SafetensorsEntry } from "../tensor/safetensors-writer.ts";
import type { AdapterModule } from "./adapter.ts";
import { type Exportable, f32Bytes, factorsOf, rankOf } from "./factors.ts";
import { checkAdapter, refuseBoth } from "./modules.ts";
import { headsOf } from "./peft-config.ts";

const PREFIX = "base_model.model.";

/** Adds one tensor, under its name in the base model. */
type Add = (name: string, shape: readonly number[], values: Float32Array) => void;

/**
 * Makes the contents of adapter_config.json and of adapter_model.safetensors (f32), for `writeSafetensors` with the metadata `format:
 * "pt"` that PyTorch's tools expect. Holds one adapter in memory.
 * @throws AdapterError when PEFT's format, which has one switch per adapter for DoRA, `lora_bias` and the orientation of weights, cannot
 * express this adapter; and errors of the adapter's `read`
 */
export async function peftFiles(adapter: Exportable): Promise<{ config: object; tensors: SafetensorsEntry[] }> {
  checkAdapter("peftFiles", adapter);
  refuseBoth({ ...adapter, file: adapter.id });
  const tensors: SafetensorsEntry[] = [];
  const add: Add = (name, shape, values) => {
    const bytes = f32Bytes(values);
    tensors.push({ name: PREFIX + name, dtype: "F32", shape: [...shape], read: () => bytes });
  };
  const dora: string[] = [];
  for (const module of adapter.modules.values()) if (await addModule(module, add)) dora.push(module.name);
  const config = configOf(adapter, dora, await addSaved(adapter, add));
  return { config, tensors };
}

function refusal({ id }: Exportable, field: string, message: string): AdapterError {
  return new AdapterError(`${message}; fold it into its base instead`, { file: id, field });
}

/** Modules, by what they have beside their factors. */
interface SavedModules {
  readonly heads: Set<string>;
  readonly biased: string[];
  readonly deltas: string[];
  readonly rows: [string, readonly number[]][];
}

/** Adds the saved tensors. */
async function addSaved(adapter: Exportable, add: Add): Promise<SavedModules> {
  const taskType = taskTypeOf(adapter);
  const found: SavedModules = { heads: new Set(), biased: [], deltas: [], rows: [] };
  for (const tensor of adapter.saved) {
    const { name, role, shape, indices = [] } = tensor;
    const owner = name.slice(0, Math.max(0, name.lastIndexOf(".")));
    const adapted = adapter.modules.has(owner);
    let key = name;
    if (role === "saved") found.heads.add(headModule(owner, taskType));
    else if (role === "rows") {
      found.rows.push([owner, indices]);
      key = `${owner}.token_adapter.trainable_tokens_delta`;
    } else if (role === "bias") {
      found.biased.push(owner);
      if (adapted) key = `${owner}.base_layer.bias`;
    } else {
      if (!adapted)
        throw refusal(adapter, name, `${name}: PEFT has no place for a bias delta of a module that is not adapted`);
      found.deltas.push(owner);
      key = `${owner}.lora_B.bias`;
    }
    add(key, shape, await tensor.read());
  }
  return found;
}

/** Contents of adapter_config.json. @throws AdapterError for a switch that only some modules need */
function configOf(adapter: Exportable, dora: readonly string[], { heads, biased, deltas, rows }: SavedModules): object {
  const modules = [...adapter.modules.values()];
  const all = (what: string, some: readonly string[]): boolean => {
    const without = modules.find(({ name }) => !some.includes(name));
    if (some.length > 0 && without !== undefined) {
      const message = `${what} is one switch for all modules in PEFT, but ${without.name} does not have it`;
      throw refusal(adapter, what, message);
    }
    return some.length > 0;
  };
  const inOut = modules.find(({ layout }) => layout === "in-out");
  const outIn = modules.find(({ layout }) => layout === "out-in");
  if (inOut && outIn) {
    const both = `${inOut.name} is [in, out] and ${outIn.name} [out, in]`;
    throw refusal(adapter, "fan_in_fan_out", `fan_in_fan_out is one switch for all modules in PEFT, but ${both}`);
  }
  const [useDora, loraBias] = [all("use_dora", dora), all("lora_bias", deltas)];
  if (useDora && loraBias) throw refusal(adapter, "lora_bias", "PEFT does not combine lora_bias with use_dora");

  const rank = commonRank(modules);
  const odd = modules.filter((module) => rankOf(module) !== rank);
  const pattern = Object.fromEntries(odd.map((module) => [exactly(module.name), rankOf(module)]));
  const onlyAdapted = biased.every((owner) => adapter.modules.has(owner));
  return {
    peft_type: "LORA",
    task_type: taskTypeOf(adapter) ?? null,
    base_model_name_or_path: adapter.baseModel ?? null,
    revision: adapter.metadata.revision ?? null,
    inference_mode: true,
    r: rank,
    lora_alpha: rank,
    lora_dropout: 0,
    rank_pattern: pattern,
    alpha_pattern: pattern,
    target_modules: modules.map(({ name }) => name),
    fan_in_fan_out: inOut !== undefined,
    bias: biased.length === 0 ? "none" : onlyAdapted ? "lora_only" : "all",
    use_dora: useDora,
    use_rslora: false,
    lora_bias: loraBias,
    init_lora_weights: true,
    modules_to_save: heads.size > 0 ? outermost(heads) : null,
    trainable_token_indices: rows.length > 0 ? Object.fromEntries(rows) : null,
  };
}

/** Adds one module's tensors. @returns whether it has a magnitude */
async function addModule(module: AdapterModule, add: Add): Promise<boolean> {
  const { name, out, layout, kernel = [] } = module;
  const { A, B, magnitude } = await factorsOf(module);
  const [keyA, keyB] =
    layout === "embedding" ? ["lora_embedding_A", "lora_embedding_B"] : ["lora_A.weight", "lora_B.weight"];
  add(`${name}.${keyA}`, A.shape, A.values);
  add(`${name}.${keyB}`, B.shape, B.values);
  if (magnitude === undefined) return false;
  add(`${name}.lora_magnitude_vector`, layout === "conv" ? [1, out, ...kernel.map(() => 1)] : [out], magnitude);
  return true;
}

function taskTypeOf({ metadata, saved }: Exportable): string | undefined {
  if (typeof metadata.task_type === "string") return metadata.task_type;
  const head = saved.find(({ name, role }) => role === "saved" && isHead(name));
  return head === undefined ? undefined : "SEQ_CLS";
}

/**
 * The module that PEFT must save whole to hold a parameter of `owner`: the head around it where the task type has one, since PEFT wraps
 * that head anyway, else `owner` itself.
 */
function headModule(owner: string, taskType: string | undefined): string {
  const heads = headsOf(taskType);
  const path = owner.split(".").map((_, i, all) => all.slice(0, i + 1).join("."));
  return path.find((module) => heads.some((head) => module.endsWith(head))) ?? owner;
}

/** Drops modules inside another: PEFT saves a module with its children. */
function outermost(modules: ReadonlySet<string>): string[] {
  return [...modules].filter((name) => ![...modules].some((other) => name.startsWith(`${other}.`))).sort();
}

/** The rank of most modules, the smaller on a tie, so that fewest patterns are needed for the others. */
function commonRank(modules: readonly AdapterModule[]): number {
  const counts = new Map<number, number>();
  for (const module of modules) counts.set(rankOf(module), (counts.get(rankOf(module)) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0])[0]?.[0] ?? 1;
}

/** A PEFT pattern that matches one module only: the anchor leaves nothing for PEFT's `(.*\.)?` in front. */
function exactly(name: string): string {
  return `^${name.replaceAll(/[\\^$.*+?()[\]{}|]/g, "\\$&")}`;
}
