/**
 * Writes a canonical adapter as an `.onnx_adapter` file of ONNX Runtime, for models that were exported with the factors of LoRA as
 * inputs. Scales stay in B, since the format has none.
 */

import { transpose } from "../tensor/derived.ts";
import { type OnnxAdapterEntry, writeOnnxAdapter } from "../tensor/onnx-adapter-writer.ts";
import { type Exportable, type FactorMatrix, f32Bytes, factorsOf, refuseModule, refuseSaved } from "./factors.ts";
import { checkAdapter } from "./modules.ts";

/**
 * Makes the bytes of an .onnx_adapter file (f32), chunk by chunk: `MODULE.lora_A.weight` [in, r] and `MODULE.lora_B.weight` [r, out].
 * Holds one adapter in memory.
 * @throws AdapterError for heads, biases, DoRA, convolutions and embeddings, which the format cannot hold
 */
export async function onnxAdapterFile(adapter: Exportable): Promise<AsyncIterable<Uint8Array>> {
  checkAdapter("onnxAdapterFile", adapter);
  refuseSaved(adapter, "an .onnx_adapter file");
  const entries: OnnxAdapterEntry[] = [];
  for (const module of adapter.modules.values()) {
    const { name, layout } = module;
    if (layout === "conv" || layout === "embedding")
      throw refuseModule(adapter, name, `is stored as ${layout}, which an .onnx_adapter file has no place for`);
    const { A, B, magnitude } = await factorsOf(module);
    if (magnitude)
      throw refuseModule(adapter, name, "has a magnitude (DoRA), which an .onnx_adapter file has no place for");
    entries.push(turned(`${name}.lora_A.weight`, A), turned(`${name}.lora_B.weight`, B));
  }
  return writeOnnxAdapter(entries);
}

function turned(name: string, { shape: [rows = 0, columns = 0], values }: FactorMatrix): OnnxAdapterEntry {
  return { name, shape: [columns, rows], bytes: f32Bytes(transpose(values, rows, columns)) };
}
