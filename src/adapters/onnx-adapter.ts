/**
 * Reads an `.onnx_adapter` of ONNX Runtime into the canonical form. Its parameters are inputs of a model, [in, r] and [r, out], with the
 * exporter's names; names that end in `lora_A.weight` and `lora_B.weight`, as Olive and PEFT write them, are read. The format has no
 * scale, which is part of a factor. Portable: folders are read in folder.ts.
 */
import { openSource } from "../open-source.ts";
import type { SourceInput } from "../source.ts";
import { type Derived, transposed, withDerived } from "../tensor/derived.ts";
import { openOnnxAdapter } from "../tensor/onnx-adapter.ts";
import type { TensorFile } from "../tensor/tensor-file.ts";
import type { Adapter } from "./adapter.ts";
import { readTaskMetadata } from "./metadata.ts";
import { assembleLora, type LoraKey, listed, sortTensors } from "./named-lora.ts";
import { parsePeftKeys } from "./peft-keys.ts";

/** The file of one adapter of ONNX Runtime. */
export interface OnnxAdapterFiles {
  /** Task id. */
  readonly id: string;
  /** The adapter's file or address, for messages. */
  readonly file: string;
  /** The .onnx_adapter file: path, URL, Blob, bytes or ByteSource. Closed by the adapter's `close`. */
  readonly tensors: SourceInput;
  /** Parsed task.json, where there is one. */
  readonly task?: unknown;
}

/**
 * Opens an adapter: checks the names, shapes and types of all parameters. Values are read, and checked, when a module's `read` is
 * called.
 * @throws AdapterError naming the parameter that is no factor of a LoRA, and what to do
 * @throws FormatError when the file breaks its format; SourceError when it cannot be read
 * @example
 * const adapter = await readOnnxAdapter({ id: "rhymes", file: "rhymes.onnx_adapter", tensors: "rhymes.onnx_adapter" });
 */
export async function readOnnxAdapter({ id, file, tensors: input, task }: OnnxAdapterFiles): Promise<Adapter> {
  const metadata = readTaskMetadata(task, `${file}/task.json`);
  const source = await openSource(input);
  const close = async (): Promise<void> => source.close?.();
  try {
    const found = await openOnnxAdapter(source);
    const tensors = allTransposed(found);
    const parts = sortTensors(tensors, parseKey, (keys, refuse) =>
      refuse(
        keys[0]!,
        `${listed(keys)}: expected names that end in lora_A.weight and lora_B.weight, with the module in front. Names of inputs are ` +
          "up to who exported the model: give the adapter that the file was made from",
      ),
    );
    const { modules, saved } = assembleLora(
      tensors,
      parts,
      () => undefined,
      () => 1,
    );
    const { byteLength } = found;
    return { id, file, byteLength, baseModel: undefined, modules, saved, metadata, warnings: [], close };
  } catch (error) {
    await close();
    throw error;
  }
}

function parseKey(name: string): LoraKey | undefined {
  const key = parsePeftKeys([name]).get(name)!;
  if (key.kind !== "part" || (key.part !== "A" && key.part !== "B")) return undefined;
  return { prefix: "", local: key.module, module: key.module, part: key.part };
}

/** Transposes [in, r] and [r, out] to [r, in] and [out, r]; other shapes stay, and are refused with their module. */
function allTransposed(file: TensorFile): TensorFile {
  const matrices = [...file.tensors].filter(([, { shape }]) => shape.length === 2);
  return withDerived(file, new Map(matrices.map(([name]): [string, Derived] => [name, transposed(file, name)])));
}
