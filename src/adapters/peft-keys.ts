/**
 * Interprets the names of the tensors in PEFT's adapter_model.safetensors. Uses names only, neither shapes nor the configuration.
 *
 * Accepted: with or without the prefix `base_model.model.`, with or without the adapter's own name after `lora_A`,
 * `modules_to_save` and the like (`lora_A.default.weight`).
 */

/** The tensors that one adapted module may have. `baseWeight` and `baseBias` are copies of the base's own. */
export type KeyRole = "A" | "B" | "embeddingA" | "embeddingB" | "loraBias" | "magnitude" | "baseWeight" | "baseBias";

/** Meaning of a tensor's name. Names of modules and parameters are those of the base model. */
export type PeftKey =
  | { kind: "part"; module: string; part: KeyRole }
  /** Replaced rows of an embedding. */
  | { kind: "rows"; module: string }
  /** A parameter by its plain name: saved whole, or a bias. */
  | { kind: "plain"; parameter: string }
  /** The same parameter under the wrapper's own name; PEFT prefers the plain one. */
  | { kind: "wrapped"; parameter: string }
  /** The base's own copy of a saved module's parameter, which PEFT does not use. */
  | { kind: "original"; parameter: string }
  | { kind: "unknown" };

const PREFIX = "base_model.model.";

/** Segments that PEFT's wrappers add. If one is left over, the name was not understood. */
const WRAPPER = /(^|\.)(base_layer|lora_[^.]*|token_adapter|modules_to_save|original_module)(\.|$)/;

const PARTS: readonly (readonly [RegExp, KeyRole])[] = [
  [/^(.+)\.lora_A(?:\.[^.]+)?\.weight$/, "A"],
  [/^(.+)\.lora_B(?:\.[^.]+)?\.weight$/, "B"],
  [/^(.+)\.lora_B(?:\.[^.]+)?\.bias$/, "loraBias"],
  [/^(.+)\.lora_embedding_A(?:\.[^.]+)?$/, "embeddingA"],
  [/^(.+)\.lora_embedding_B(?:\.[^.]+)?$/, "embeddingB"],
  [/^(.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?$/, "magnitude"],
  [/^(.+)\.base_layer\.weight$/, "baseWeight"],
  [/^(.+)\.base_layer\.bias$/, "baseBias"],
];

/** Sorts the names of a file's tensors. */
export function parsePeftKeys(keys: Iterable<string>): Map<string, PeftKey> {
  const names = [...keys];
  const adapters = new Set(["default"]);
  for (const name of names) {
    const adapter = /\.lora_[AB]\.([^.]+)\.weight$/.exec(name)?.[1];
    if (adapter !== undefined) adapters.add(adapter);
  }
  return new Map(names.map((name) => [name, parse(name, adapters)]));
}

function parse(key: string, adapters: ReadonlySet<string>): PeftKey {
  const name = key.startsWith(PREFIX) ? key.slice(PREFIX.length) : key;
  const known = (base: string, result: PeftKey): PeftKey => (WRAPPER.test(base) ? { kind: "unknown" } : result);

  for (const [pattern, part] of PARTS) {
    const module = pattern.exec(name)?.[1];
    if (module !== undefined) return known(module, { kind: "part", module, part });
  }
  const module = /^(.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$/.exec(name)?.[1];
  if (module !== undefined) return known(module, { kind: "rows", module });

  const [, owner, wrapper, rest] = /^(.+)\.(modules_to_save|original_module)\.(.+)$/.exec(name) ?? [];
  if (owner === undefined || rest === undefined) return known(name, { kind: "plain", parameter: name });
  if (wrapper === "original_module") {
    const parameter = `${owner}.${rest}`;
    return known(parameter, { kind: "original", parameter });
  }
  // A first segment is the adapter's name only where it is known to be one: a saved module may have children.
  const [first = "", ...others] = rest.split(".");
  const parameter = others.length > 0 && adapters.has(first) ? `${owner}.${others.join(".")}` : `${owner}.${rest}`;
  return known(parameter, { kind: "wrapped", parameter });
}
