/**
 * Formats of adapters, one entry each: its files, what recognises them, how it is read and written, and its words in
 * messages. A new format is an entry here, and a file with its reader and writer.
 */
import { join } from "node:path";
import type { WeightHost } from "../core/base.ts";
import type { ByteSource } from "../source.ts";
import { openGguf } from "../tensor/gguf.ts";
import { writeSafetensors } from "../tensor/safetensors.ts";
import type { Adapter, AdapterFile, BaseFacts, Exportable } from "./adapter.ts";
import { diffusersFile, MODELS, readDiffusers } from "./diffusers.ts";
import { ggufFile, readGguf } from "./gguf.ts";
import { isKohyaName, kohyaFile, readKohya } from "./kohya.ts";
import { readMlx } from "./named-lora.ts";
import { onnxAdapterFile, readOnnxAdapter } from "./onnx-adapter.ts";
import { peftFiles, readPeft } from "./peft.ts";
import { readPeftConfig } from "./peft-config.ts";

/** Files of an adapter that has a folder of its own. */
export interface AdapterFolder {
  /** Name of the file with its tensors. */
  readonly tensors: string;
  /** Name of its configuration, which it is incomplete without. */
  readonly config?: string;
  /** Names that show its folder, so that a file which lacks is reported, not passed over. */
  readonly marks: readonly string[];
  /** Its tensors as a pickle, which is refused, and how to convert that. */
  readonly pickle?: { readonly name: string; readonly convert: string };
}

/** What an adapter takes from outside its tensors, read when it is asked for. */
interface Surroundings {
  /** Parsed configuration. */
  config(): Promise<unknown>;
  /** Names and heads of the base; undefined where no base was given. */
  facts(): Promise<BaseFacts | undefined>;
  weights(): Promise<WeightHost | undefined>;
}

/** Contents of a file, chunk by chunk. */
type Chunks = Iterable<Uint8Array> | AsyncIterable<Uint8Array>;

export interface AdapterFormat {
  /** Name in options and reports. */
  readonly name: string;
  readonly folder?: AdapterFolder;
  /** Ending of a file that is an adapter by itself. */
  readonly ending?: string;
  /** Recognises such a file in a folder of adapters, where models may have the same ending. Default: by its ending. */
  isAdapter?(source: ByteSource): Promise<boolean>;
  /** Recognises a safetensors file of any name, by the names of its tensors, which are those of a LoRA. */
  hasNames?(names: readonly string[]): boolean;
  read(files: AdapterFile, around: Surroundings): Promise<Adapter>;
  /** Files of an adapter's folder, by their names. */
  writeFolder?(adapter: Exportable): Promise<ReadonlyMap<string, Chunks>>;
  /** @param base facts, where a base was given */
  writeFile?(adapter: Exportable, base: BaseFacts): Promise<Chunks>;
}

export const CONFIG = "adapter_config.json";
/** The file of any adapter with facts that its tensors do not tell. */
export const TASK = "task.json";
const PEFT = "adapter_model.safetensors";
const PEFT_PICKLE = "adapter_model.bin";
const DIFFUSERS = "pytorch_lora_weights.safetensors";
const DIFFUSERS_PICKLE = "pytorch_lora_weights.bin";
/** transformers refuses a file without it. */
const METADATA: ReadonlyMap<string, string> = new Map([["format", "pt"]]);

const PEFT_CONVERT =
  "load it with PEFT where you trust it (PeftModel.from_pretrained) and call save_pretrained(folder, safe_serialization=True)";

/** All formats, those that recognise files first at the front. */
export const FORMATS: readonly AdapterFormat[] = [
  {
    name: "peft",
    folder: {
      tensors: PEFT,
      config: CONFIG,
      marks: [CONFIG, PEFT, PEFT_PICKLE],
      pickle: { name: PEFT_PICKLE, convert: PEFT_CONVERT },
    },
    async read(files, around) {
      const config = await around.config();
      const { start } = readPeftConfig(config, `${files.file}/${CONFIG}`);
      return readPeft({ ...files, config, base: start && (await around.weights()) });
    },
    async writeFolder(adapter) {
      const { config, tensors } = await peftFiles(adapter);
      const files = new Map<string, Chunks>([
        [PEFT, writeSafetensors(tensors, METADATA)],
        [CONFIG, jsonFile(config)],
      ]);
      return Object.keys(adapter.metadata).length > 0 ? files.set(TASK, jsonFile(adapter.metadata)) : files;
    },
  },
  {
    name: "mlx",
    folder: { tensors: "adapters.safetensors", config: CONFIG, marks: [CONFIG] },
    read: async (files, around) => readMlx({ ...files, config: await around.config() }),
  },
  {
    name: "kohya",
    hasNames: (names) => names.some(isKohyaName),
    read: async (files, around) => readKohya({ ...files, base: await around.facts() }),
    writeFile: async (adapter) => writeSafetensors(await kohyaFile(adapter), METADATA),
  },
  {
    name: "diffusers",
    folder: {
      tensors: DIFFUSERS,
      marks: [DIFFUSERS, DIFFUSERS_PICKLE],
      pickle: {
        name: DIFFUSERS_PICKLE,
        convert:
          `load it where you trust it (torch.load(file, weights_only=True)) and save what it holds as ${DIFFUSERS} ` +
          "(safetensors.torch.save_file)",
      },
    },
    hasNames: () => true,
    read: readDiffusers,
    writeFile: async (adapter) => writeSafetensors(await diffusersFile(adapter), METADATA),
  },
  {
    name: "gguf",
    ending: ".gguf",
    isAdapter: async (source) => (await openGguf(source)).fields.get("general.type") === "adapter",
    read: async (files, around) => readGguf({ ...files, base: await around.facts() }),
    writeFile: ggufFile,
  },
  { name: "onnx_adapter", ending: ".onnx_adapter", read: readOnnxAdapter, writeFile: onnxAdapterFile },
];

function jsonFile(value: object): Uint8Array[] {
  return [new TextEncoder().encode(`${JSON.stringify(value, null, 2)}\n`)];
}

/** Names of the files in an adapter's own folder; none where a format has single files. */
export function folderFiles({ folder }: AdapterFormat): string[] {
  return folder ? [...(folder.config ? [folder.config] : []), folder.tensors] : [];
}

/** Paths that an adapter may be read from. */
export function filesOf({ file }: Pick<Adapter, "file">): string[] {
  const names = new Set([TASK, ...FORMATS.flatMap(folderFiles)]);
  return [file, ...["", ...MODELS].flatMap((model) => [...names].map((name) => join(file, model, name)))];
}
