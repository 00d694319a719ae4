/**
 * What transformers calls a module in one major version and called it in another. An adapter has the names of the version that trained
 * it, a checkpoint those of the version that saved it first, and an export those of the version that exported it.
 */

import { NameMatcher } from "./names.ts";

/** One way of calling modules against another, by segments; "#" is a number. Earlier pairs come first, in both directions. */
type Renaming = readonly (readonly [former: string, now: string])[];

const attention = (inside: string): Renaming => [
  [`attention.${inside}.query`, "attention.q_proj"],
  [`attention.${inside}.key`, "attention.k_proj"],
  [`attention.${inside}.value`, "attention.v_proj"],
  ["attention.output.dense", "attention.o_proj"],
];
const PERCEPTRON: Renaming = [
  ["intermediate.dense", "mlp.fc1"],
  ["output.dense", "mlp.fc2"],
];

const RENAMINGS: readonly Renaming[] = [
  // ViT, DeiT, BEiT, AST, ViT-MAE.
  [["encoder.layer.#", "layers.#"], ...attention("attention"), ...PERCEPTRON],
  // DINOv2.
  attention("attention"),
  // Swin.
  [...attention("self"), ...PERCEPTRON],
  // SegFormer.
  [
    ["encoder.block.#", "stages.#.blocks"],
    ["decode_head.linear_c", "decode_head.linear_projections"],
    ...attention("self"),
    ["mlp.dense1", "mlp.fc1"],
    ["mlp.dense2", "mlp.fc2"],
  ],
  // Models of images and text, around a language model; and that one exported by itself.
  [
    ["language_model.model", "model.language_model"],
    ["vision_tower.vision_model", "model.vision_tower"],
  ],
  [["model.layers", "model.language_model.layers"]],
];

const patterns = new Map<string, RegExp>();

/** Whole segments, wherever they stand in a name. */
function patternOf(segments: string): RegExp {
  let pattern = patterns.get(segments);
  if (!pattern) {
    const inside = segments.replaceAll(".", "\\.").replace("#", "(?<number>\\d+)");
    patterns.set(segments, (pattern = new RegExp(`(?<before>^|\\.)${inside}(?=\\.)`, "g")));
  }
  return pattern;
}

/** Other names that a parameter may have, each once, without its own. */
export function aliasesOf(name: string): Set<string> {
  const found = new Set<string>();
  for (const renaming of RENAMINGS) {
    for (const [from, to] of [
      [0, 1],
      [1, 0],
    ] as const) {
      let other = name;
      for (const pair of renaming) {
        const replacement = `$<before>${pair[to].replace("#", "$<number>")}`;
        other = other.replace(patternOf(pair[from]), replacement);
      }
      found.add(other);
    }
  }
  found.delete(name);
  return found;
}

/** Finds what its own name does not find by what other versions call it. Loaded where names alone do not do. */
export class AliasMatcher extends NameMatcher {
  override find(name: string): ReturnType<NameMatcher["find"]> {
    const own = super.find(name);
    if ("name" in own || own.ambiguous) return own;
    const names = new Set<string>();
    for (const alias of aliasesOf(name)) {
      const found = super.find(alias);
      if ("name" in found) names.add(found.name);
      else if (found.ambiguous) for (const candidate of found.candidates()) names.add(candidate);
    }
    const [first, ...others] = names;
    if (first === undefined) return own;
    return others.length === 0 ? { name: first } : { ambiguous: true, candidates: () => [...names] };
  }
}
