/**
 * A base model from whatever serves as one.
 */
import { openSource } from "../open-source.ts";
import type { FetchOptions, ReadOptions, SourceInput } from "../source.ts";
import type { BaseInput, WeightHost } from "./host.ts";

/** @throws TypeError when `base` is none of the accepted kinds; SourceError, FormatError when the file cannot be read */
export async function openHost(base: BaseInput, options: FetchOptions & ReadOptions = {}): Promise<WeightHost> {
  if (typeof (base as Partial<WeightHost> | null)?.list === "function") return base as WeightHost;
  // An app has a base of one kind.
  if (base instanceof Map) return (await import("./memory-host.ts")).memoryHost(base);
  const { openSafetensorsHost } = await import("./safetensors-host.ts");
  return openSafetensorsHost(await openSource(base as SourceInput, options, "base"), options);
}
