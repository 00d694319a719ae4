/**
 * A safetensors file as the base model. Loaded where the base is one: apps whose weights belong to a framework need no reader.
 */
import { SourceError } from "../errors.ts";
import { wrongKind } from "../format/kind.ts";
import type { ByteSource, ReadOptions } from "../source.ts";
import type { FloatDtype } from "../tensor/dtypes.ts";
import { openSafetensors, type SafetensorsFile } from "../tensor/safetensors.ts";
import type { WeightHost } from "./host.ts";

const DTYPES = new Map<string, FloatDtype>([
  ["F32", "f32"],
  ["F16", "f16"],
  ["BF16", "bf16"],
]);

/** The float tensors of a safetensors file. Read-only. */
export function safetensorsHost(file: SafetensorsFile): WeightHost {
  return {
    *list() {
      for (const [name, { dtype, shape }] of file.tensors) {
        const type = DTYPES.get(dtype);
        if (type) yield { name, shape, dtype: type };
      }
    },
    async read(name, into, options) {
      const tensor = file.tensors.get(name);
      const dtype = DTYPES.get(tensor?.dtype ?? "");
      if (!tensor || !dtype) throw new SourceError(`has no float tensor "${name}"`, { file: file.name });
      const data = await file.read(name, options);
      into?.set(data);
      return { dtype, shape: tensor.shape, data: into ?? data, byteOffset: 0 };
    },
  };
}

/**
 * @param source closed with the host, or at once when it is no such file
 * @throws SourceError, FormatError when it cannot be read
 */
export async function openSafetensorsHost(source: ByteSource, options: ReadOptions): Promise<WeightHost> {
  const close = async (): Promise<void> => source.close?.();
  try {
    return { ...safetensorsHost(await openSafetensors(source, { signal: options.signal })), close };
  } catch (error) {
    const refused = await wrongKind(error, source, "a safetensors file");
    await close();
    throw refused;
  }
}
