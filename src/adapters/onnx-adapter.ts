/**
 * Reads an `.onnx_adapter` of ONNX Runtime into the canonical form. Its parameters are inputs of a model, [in, r] and [r, out], with the
 * exporter's names; names that end in `lora_A.weight` and `lora_B.weight`, as Olive and PEFT write them, are read. The format has no
 * scale, which is part of a factor. Portable: folders are read in folder.ts.
 */
import { openOnnxAdapter } from "../tensor/onnx-adapter.ts";
import { type Adapter, readAdapterFile } from "./adapter.ts";
import { assembleLora, type LoraKey, sortTensors, transposeMatrices } from "./named-lora.ts";
import type { PeftFiles } from "./peft.ts";
import { parsePeftKeys } from "./peft-keys.ts";
import { openFile } from "./safetensors.ts";

/** The file of one adapter of ONNX Runtime; `tensors` is the .onnx_adapter file. */
export type OnnxAdapterFiles = Omit<PeftFiles, "config" | "base">;

/**
 * Opens an adapter: checks the names, shapes and types of all parameters. Values are read, and checked, when a module's `read` is
 * called.
 * @throws AdapterError naming the parameter that is no factor of a LoRA, and what to do
 * @throws FormatError when the file breaks its format; SourceError when it cannot be read
 * @example
 * const adapter = await readOnnxAdapter({ id: "rhymes", file: "rhymes.onnx_adapter", tensors: "rhymes.onnx_adapter" });
 */
export async function readOnnxAdapter(files: OnnxAdapterFiles): Promise<Adapter> {
  return readAdapterFile(
    files,
    (input) => openFile(input, openOnnxAdapter, "an adapter of ONNX Runtime"),
    (found) => {
      const tensors = transposeMatrices(found, /./);
      const expected =
        "expected names that end in lora_A.weight and lora_B.weight, with the module in front. Names of inputs are up to who " +
        "exported the model: give the adapter that the file was made from";
      const parts = sortTensors(tensors, parseKey, () => expected);
      return assembleLora(tensors, parts, () => 1);
    },
  );
}

function parseKey(name: string): LoraKey | undefined {
  const key = parsePeftKeys([name]).get(name)!;
  if (key.kind !== "part" || (key.part !== "A" && key.part !== "B")) return undefined;
  return { prefix: "", local: key.module, module: key.module, part: key.part };
}
