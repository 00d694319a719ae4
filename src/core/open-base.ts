/**
 * A base model from whatever serves as one: a host, tensors in the user's memory or on a device, or a safetensors file,
 * which is only read.
 */
import { SourceError } from "../errors.ts";
import { wrongKind } from "../format/kind.ts";
import { openSource } from "../open-source.ts";
import type { FetchOptions, ReadOptions, SourceInput } from "../source.ts";
import type { FloatDtype } from "../tensor/dtypes.ts";
import type { SafetensorsFile } from "../tensor/safetensors.ts";
import type { BaseInput, WeightHost } from "./base.ts";
import { FLOATS, memoryHost } from "./load-base.ts";

/**
 * The host of a base, opened where it is a file.
 * @throws TypeError when `base` is none of the accepted kinds; SourceError, FormatError when the file cannot be read
 */
export async function openHost(base: BaseInput, options: FetchOptions & ReadOptions = {}): Promise<WeightHost> {
  if (typeof (base as Partial<WeightHost> | null)?.list === "function") return base as WeightHost;
  if (base instanceof Map) return memoryHost(base);
  const source = await openSource(base as SourceInput, options, "base");
  const close = async (): Promise<void> => source.close?.();
  // Apps whose weights are in memory need no reader.
  const { openSafetensors } = await import("../tensor/safetensors.ts");
  try {
    return { ...safetensorsHost(await openSafetensors(source, { signal: options.signal })), close };
  } catch (error) {
    const refused = await wrongKind(error, source, "a safetensors file");
    await close();
    throw refused;
  }
}

/** The number format that safetensors call by this name; undefined for others. */
const floatOf = (dtype = ""): FloatDtype | undefined => FLOATS.find((float) => float.toUpperCase() === dtype);

/** The float tensors of a safetensors file. Read-only. */
export function safetensorsHost(file: SafetensorsFile): WeightHost {
  return {
    *list() {
      for (const [name, { dtype, shape }] of file.tensors) {
        const type = floatOf(dtype);
        if (type) yield { name, shape, dtype: type };
      }
    },
    async read(name, into, options) {
      const tensor = file.tensors.get(name);
      const dtype = floatOf(tensor?.dtype);
      if (!tensor || !dtype) throw new SourceError(`has no float tensor "${name}"`, { file: file.name });
      const data = await file.read(name, options);
      into?.set(data);
      return { dtype, shape: tensor.shape, data: into ?? data, byteOffset: 0 };
    },
  };
}
