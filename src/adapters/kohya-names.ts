/**
 * Names of modules in kohya's LoRA files, where an underscore stands for every dot. Without the base's own list of modules they are split
 * by the words that module names of Stable Diffusion's UNets and of CLIP consist of; no such name can be split in two ways. Files for
 * SDXL have the names of its original code ("input_blocks_4_1"), which are translated as in diffusers 0.42
 * (loaders/lora_conversion_utils.py).
 */

/** Prefixes of kohya and LyCORIS, and the models they stand for. */
const PREFIXES: readonly (readonly [string, string])[] = [
  ["lora_unet_", "unet"],
  ["lora_te1_", "text_encoder"],
  ["lora_te2_", "text_encoder_2"],
  ["lora_te3_", "text_encoder_3"],
  ["lora_te_", "text_encoder"],
  ["lora_transformer_", "transformer"],
  ["lycoris_unet_", "unet"],
  ["lycoris_", "unet"],
];

/** Words that contain underscores of their own. */
const WORDS: ReadonlySet<string> = new Set(
  (
    "down_blocks mid_block up_blocks attentions resnets transformer_blocks attn1 attn2 to_q to_k to_v to_out ff net proj proj_in " +
    "proj_out conv conv1 conv2 conv_in conv_out conv_shortcut time_emb_proj time_embedding add_embedding linear_1 linear_2 " +
    "downsamplers upsamplers text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection " +
    "embeddings token_embedding position_embedding"
  ).split(" "),
);
const MOST_PARTS = 4;

/** Splits a flattened name into the model of its prefix and the rest; undefined where it has no prefix. */
export function splitPrefix(name: string): { model: string; flat: string } | undefined {
  const found = PREFIXES.find(([prefix]) => name.startsWith(prefix));
  return found && { model: found[1], flat: name.slice(found[0].length) };
}

/** The module of a flattened name; undefined where a word is unknown. */
export function unflatten(flat: string): string | undefined {
  const parts = (diffusersName(flat) ?? flat).split("_");
  const words: string[] = [];
  for (let at = 0; at < parts.length; ) {
    const digits = /^\d+$/.test(parts[at]!);
    let taken = digits ? 1 : Math.min(MOST_PARTS, parts.length - at);
    while (!digits && taken > 0 && !WORDS.has(parts.slice(at, at + taken).join("_"))) taken--;
    if (taken === 0) return undefined;
    words.push(parts.slice(at, at + taken).join("_"));
    at += taken;
  }
  return words.join(".");
}

/** Layers of a block in the original code of Stable Diffusion; equal in the UNets of all versions. */
const LAYERS = 2;

/** Names of the parts of a residual block in the original code. */
const RESNET: ReadonlyMap<string, string> = new Map([
  ["in_layers_2", "conv1"],
  ["out_layers_3", "conv2"],
  ["emb_layers_1", "time_emb_proj"],
  ["skip_connection", "conv_shortcut"],
]);
const OUTSIDE: ReadonlyMap<string, string> = new Map([
  ["input_blocks_0_0", "conv_in"],
  ["out_2", "conv_out"],
  ["time_embed_0", "time_embedding_linear_1"],
  ["time_embed_2", "time_embedding_linear_2"],
  ["label_emb_0_0", "add_embedding_linear_1"],
  ["label_emb_0_2", "add_embedding_linear_2"],
]);

/** Translates a flattened name of the original code to diffusers; undefined where it is none. */
function diffusersName(flat: string): string | undefined {
  const outside = OUTSIDE.get(flat);
  if (outside !== undefined) return outside;
  const [, blocks, first, second, rest = ""] =
    /^(input_blocks|output_blocks|middle_block)_(\d+)(?:_(\d+))?(?:_(.+))?$/.exec(flat) ?? [];
  if (blocks === undefined) return undefined;
  const i = Number(first);
  if (blocks === "middle_block") {
    const inner = [second, rest].filter(Boolean).join("_");
    if (i > 2) return undefined;
    return i === 1 ? `mid_block_attentions_0_${inner}` : `mid_block_resnets_${i / 2}_${RESNET.get(inner) ?? inner}`;
  }
  const down = blocks === "input_blocks";
  const at = down ? i - 1 : i;
  const block = `${down ? "down" : "up"}_blocks_${Math.floor(at / (LAYERS + 1))}`;
  if (down && rest === "op") return `${block}_downsamplers_0_conv`;
  if (!down && rest === "conv") return `${block}_upsamplers_0_conv`;
  const layer = at % (LAYERS + 1);
  return second === "0"
    ? `${block}_resnets_${layer}_${RESNET.get(rest) ?? rest}`
    : `${block}_attentions_${layer}_${rest}`;
}

/** kohya's name of a module of a model; undefined where kohya has no prefix for the model. */
export function flatten(module: string): string | undefined {
  const model = [...new Set(PREFIXES.map(([, model]) => model))].find((name) => module.startsWith(`${name}.`));
  if (model === undefined) return undefined;
  const prefix = model === "text_encoder" ? "lora_te1_" : PREFIXES.find(([, name]) => name === model)![0];
  return prefix + module.slice(model.length + 1).replaceAll(".", "_");
}
