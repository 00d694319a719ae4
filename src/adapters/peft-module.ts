/**
 * One adapted module of a PEFT file: its tensors must fit each other and the configuration.
 */
import type { Layout } from "../format/format.ts";
import { transpose } from "../tensor/derived.ts";
import type { Term } from "../tensor/term.ts";
import type { AdapterModule } from "./adapter.ts";
import { CONVERT, withoutBase } from "./peft-config.ts";
import type { KeyRole } from "./peft-keys.ts";
import type { PeftTensors } from "./peft-places.ts";
import type { BaseStart } from "./start.ts";

/** @throws AdapterError when its tensors do not fit each other or the configuration */
export function readModule(name: string, keys: ReadonlyMap<KeyRole, string>, given: PeftTensors): AdapterModule {
  const tensors: PeftTensors = {
    ...given,
    refuse: (field, message) => given.refuse(field, `module ${name}: ${message}`),
  };
  const { config, read } = tensors;
  const factors = factorKeys(name, keys, tensors);
  const { keyA, keyB, embedding } = factors;
  const { rank, inputs, out, kernel } = checkedShapes(factors, tensors);
  const { rank: expected, scale } = config.forModule(name);
  if (rank !== expected) {
    throw tensors.refuse(
      "r",
      `r and rank_pattern give rank ${expected}, but ${keyA} has ${rank}. PEFT refuses this file too, and its scale ` +
        "is uncertain: set r or rank_pattern in the configuration to what it was trained with",
    );
  }
  const magnitude = keys.get("magnitude");
  checkExtra(tensors, "use_dora", config.dora, "lora_magnitude_vector", magnitude, out);
  checkExtra(tensors, "lora_bias", config.loraBias, "lora_B.bias", keys.get("loraBias"), out);

  const layout: Layout = embedding
    ? "embedding"
    : kernel.length > 0
      ? "conv"
      : config.fanInFanOut
        ? "in-out"
        : "out-in";
  const module: AdapterModule = {
    name,
    out,
    in: kernel.reduce((a, b) => a * b, inputs),
    rank,
    layout,
    ...(kernel.length > 0 && { kernel }),
    async read() {
      const A = await read(keyA);
      const Bt = transpose(await read(keyB, scale), out, rank);
      return { rank, A, Bt, magnitude: magnitude === undefined ? undefined : await read(magnitude) };
    },
  };
  // Embeddings begin as they are, whatever the start of linear layers.
  return config.start === undefined || embedding ? module : started(module, config.start, scale, tensors);
}

/** The module relative to the base as it was before training. */
function started(
  module: AdapterModule,
  start: BaseStart,
  scale: number,
  { base, file, refuse }: PeftTensors,
): AdapterModule {
  if (module.layout === "conv") throw refuse("init_lora_weights", `init_lora_weights is "${start}", for a convolution`);
  if (base === undefined) {
    const advice = `Give the base's weights, as \`base\` (--base). Or: ${CONVERT}`;
    throw refuse("init_lora_weights", `${withoutBase(start)}. ${advice}`);
  }
  const rank = module.rank + Math.min(module.rank, module.in, module.out);
  const read = async (): Promise<Term> =>
    (await import("./start.ts")).fromBase(start, module, await module.read(), scale, base, file.name);
  return { ...module, rank, read };
}

/** Largest rank and kernel that a pack holds. */
const MAX_SIZE = 65_535;

/** The tensors of both factors. */
interface FactorKeys {
  readonly keyA: string;
  readonly keyB: string;
  readonly embedding: boolean;
}

function factorKeys(name: string, keys: ReadonlyMap<KeyRole, string>, { refuse }: PeftTensors): FactorKeys {
  const embedding = keys.has("embeddingA") || keys.has("embeddingB");
  if (embedding && (keys.has("A") || keys.has("B"))) {
    throw refuse(name, "has both lora_A or lora_B and lora_embedding_A or lora_embedding_B; save the adapter again");
  }
  const keyA = keys.get(embedding ? "embeddingA" : "A");
  const keyB = keys.get(embedding ? "embeddingB" : "B");
  if (keyA !== undefined && keyB !== undefined) return { keyA, keyB, embedding };
  const [one, other] = keyA === undefined ? [keyB!, "A"] : [keyA, "B"];
  throw refuse(one, `has ${one} but no factor ${other}; save the adapter again`);
}

function checkedShapes(
  { keyA, keyB, embedding }: FactorKeys,
  { shape, describe, refuse }: PeftTensors,
): { rank: number; inputs: number; out: number; kernel: readonly number[] } {
  const [shapeA, shapeB] = [shape(keyA), shape(keyB)];
  const found = `${describe(keyA)} and ${describe(keyB)}`;
  const [rank = 0, inputs = 0, ...kernel] = shapeA;
  const [out = 0, rankB = 0, ...ones] = shapeB;
  if ([...shapeA, ...shapeB].includes(0) || shapeA.length < 2 || shapeB.length < 2) {
    throw refuse(keyA, `${found}: incomplete, as when DeepSpeed or FSDP shards are not gathered; save it again`);
  }
  if (kernel.length !== ones.length || kernel.length > (embedding ? 0 : 3) || ones.some((size) => size !== 1)) {
    throw refuse(keyA, `${found}; expected [r, in] and [out, r], or [r, in, k…] and [out, r, 1…]; save it again`);
  }
  if (Math.max(rank, ...kernel) > MAX_SIZE) {
    throw refuse(keyA, `${found}: rank and kernel are ${MAX_SIZE} at most (SPEC.md, sections 4.2 and 6.1)`);
  }
  if (rank !== rankB && kernel.length > 0 && rank % rankB === 0) {
    throw refuse(
      keyB,
      `${found}: a grouped convolution (${rank / rankB} groups). PEFT's update mixes the groups, which the base ` +
        "weight cannot hold (PEFT cannot merge it either); leave this module out of target_modules",
    );
  }
  if (rank !== rankB)
    throw refuse(keyB, `${found}: ranks ${rank} and ${rankB} differ; the files of two adapters are mixed`);
  return { rank, inputs, out, kernel };
}

/** Checks a vector [out] that a module has if a field of the configuration is set; magnitudes of convolutions are [1, out, 1…]. */
function checkExtra(
  { refuse, shape, describe }: PeftTensors,
  field: "use_dora" | "lora_bias",
  set: boolean,
  what: string,
  key: string | undefined,
  out: number,
): void {
  if (set !== (key !== undefined))
    throw refuse(field, `${field} is ${set}, but the file has ${key ?? `no ${what}`}; save the adapter again`);
  if (key === undefined) return;
  const found = shape(key);
  const at = field === "use_dora" && found.length > 1 ? 1 : 0;
  if (found[at] === out && found.reduce((a, b) => a * b, 1) === out && (at > 0 || found.length === 1)) return;
  throw refuse(key, `${describe(key)}, expected [${out}]; save the adapter again`);
}
