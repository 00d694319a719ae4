/**
 * Facts that some formats leave to the base model: kohya's files flatten the names of modules, and GGUF's order the rows of two
 * projections by heads.
 */
import { AdapterError } from "../errors.ts";

/** Known facts of a base model. */
export interface BaseFacts {
  /** Names of its modules or parameters; in a pipeline with the model in front ("unet.mid_block.…"). */
  readonly names?: Iterable<string> | undefined;
  /** Attention heads, and those of keys and values. */
  readonly heads?: number | undefined;
  readonly kvHeads?: number | undefined;
  /** llama.cpp's name of the architecture, which all models of a kind share: "llama". */
  readonly architecture?: string | undefined;
}

/** llama.cpp's names of architectures that transformers calls otherwise (`model_type`). */
const ARCHITECTURES: ReadonlyMap<unknown, string> = new Map([
  ["mistral", "llama"],
  ["gemma3_text", "gemma3"],
]);

/** Reads architecture and heads from a parsed config.json of transformers. Undefined where it has neither. */
export function factsOfConfig(config: unknown): BaseFacts | undefined {
  if (typeof config !== "object" || config === null) return undefined;
  const fields = config as Record<string, unknown>;
  // Models that also see or hear keep their language model's configuration one level deeper.
  const text = fields["text_config"];
  const heads = fields["num_attention_heads"] ?? fields["n_head"];
  if (heads === undefined && text !== undefined) return factsOfConfig(text);
  const kvHeads = fields["num_key_value_heads"] ?? heads;
  if (!isCount(heads) || !isCount(kvHeads)) return undefined;
  const type = fields["model_type"];
  return { heads, kvHeads, architecture: ARCHITECTURES.get(type) ?? (typeof type === "string" ? type : undefined) };
}

export function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 1;
}

const SUFFIX = /\.(weight|bias)$/;

/** Modules of a base by flattened name. */
export type FlatNames = ReadonlyMap<string, readonly string[]>;

/** @param names of modules or parameters */
export function flatNames(names: Iterable<string>): FlatNames {
  const found = new Map<string, Set<string>>();
  for (const name of names) {
    const module = name.replace(SUFFIX, "");
    const flat = module.replaceAll(".", "_");
    if (!found.has(flat)) found.set(flat, new Set());
    found.get(flat)!.add(module);
  }
  return new Map([...found].map(([flat, modules]) => [flat, [...modules]]));
}

/** The only module with a flattened name; undefined where there is none. @throws AdapterError for several */
export function moduleOf(flat: string, names: FlatNames, file: string): string | undefined {
  const [found, other] = names.get(flat) ?? [];
  if (found === undefined || other === undefined) return found;
  const message = `${flat} can be ${found} and ${other} of the base: rename the tensor with its dots`;
  throw new AdapterError(message, { file, field: flat });
}
