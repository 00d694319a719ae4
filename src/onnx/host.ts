/**
 * An ONNX model as a base: its weights, under the names that adapters call them by. Read-only: what a task changes
 * reaches a model through the runtime that has loaded it.
 */
import type { FloatType } from "../dtypes.ts";
import { FormatError, SourceError } from "../errors.ts";
import type { View, WeightHost } from "../runtime/host.ts";
import { openSource, type ByteSource, type FetchOptions, type ReadOptions, type SourceInput } from "../source.ts";
import { parseModel } from "./model.ts";
import { findParameters, type OnnxParameter } from "./modules.ts";
import { readTensor } from "./tensors.ts";

/** How the model and the files beside it are read. */
export interface OnnxHostOptions extends FetchOptions, ReadOptions {
  /**
   * The file that the model calls `location` ("model.onnx_data"). When the model is given as a path or URL, the file of
   * that name beside it, unless this says otherwise.
   */
  external?: (location: string) => SourceInput | Promise<SourceInput>;
}

/**
 * Opens a model and finds its parameters. The file is read whole and stays in memory; files beside it are read when a
 * weight in them is. Close the host to release those.
 *
 * @example
 * const base = await openOnnxHost("model.onnx");
 * const runtime = await createRuntime(pack, { base });
 *
 * @throws FormatError when the file is truncated or is no ONNX model
 * @throws SourceError when the file cannot be read; `read` throws it also for missing external files
 */
export async function openOnnxHost(input: SourceInput, options: OnnxHostOptions = {}): Promise<WeightHost> {
  const source = await openSource(input, options);
  const bytes = await readAll(source, options).finally(() => source.close?.());
  const model = parseModel(bytes, source.name);
  const parameters = new Map<string, OnnxParameter & { dtype: FloatType }>();
  for (const parameter of findParameters(model)) {
    const { name, dtype } = parameter;
    if (dtype !== "other") parameters.set(name, { ...parameter, dtype });
  }

  const locate = options.external ?? besides(input, source.name);
  const files = new Map<string, Promise<ByteSource>>();
  const external = (location: string): Promise<ByteSource> => {
    let file = files.get(location);
    if (!file) {
      file = Promise.resolve(locate!(location)).then((found) => openSource(found, options));
      files.set(location, file);
      // Not kept when it failed: the next read may find the file.
      file.catch(() => files.delete(location));
    }
    return file;
  };

  return {
    *list() {
      for (const { name, shape, dtype, layout } of parameters.values()) {
        yield { name, shape, dtype, ...(layout ? { layout } : {}) };
      }
    },
    async read(name, into, readOptions): Promise<View> {
      const parameter = parameters.get(name);
      if (!parameter) throw new SourceError(`has no float parameter "${name}"`, { file: model.name });
      const tensor = model.graph.initializers.get(parameter.initializer)!;
      const { shape, data } = await readTensor(tensor, model.name, locate && external, readOptions);
      into?.set(data);
      return { dtype: parameter.dtype, shape, data: into ?? data, byteOffset: 0 };
    },
    async close() {
      const opened = await Promise.allSettled(files.values());
      files.clear();
      await Promise.all(opened.map((file) => file.status === "fulfilled" && file.value.close?.()));
    },
  };
}

async function readAll(source: ByteSource, options: ReadOptions): Promise<Uint8Array> {
  // A URL's size is known after the first read.
  if (source.byteLength === undefined) await source.read(0, 1, options);
  const { byteLength } = source;
  if (byteLength === undefined) {
    throw new SourceError("does not say its size after the first read; fetch it yourself and pass its bytes", {
      file: source.name,
    });
  }
  return source.read(0, byteLength, options);
}

/** Finds files beside a model that has a place; undefined for bytes, blobs and sources, which have none. */
function besides(input: SourceInput, model: string): ((location: string) => SourceInput) | undefined {
  if (!(typeof input === "string" || input instanceof URL) || /^(blob|data):/i.test(String(input))) return undefined;
  return (location) => {
    // The model's author says which file: it must not be one outside the model's folder.
    if (/^[/\\]|^[a-z]+:|(^|[/\\])\.\.([/\\]|$)/i.test(location)) {
      const message = `lie at "${location}", outside the model's folder; give them with the option \`external\``;
      throw new FormatError(message, { file: model, part: "external data" });
    }
    const isUrl = input instanceof URL || /^https?:/i.test(input);
    return isUrl ? new URL(encodeURI(location), input) : input.replace(/[^/\\]*$/, "") + location;
  };
}
