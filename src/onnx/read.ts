/**
 * Reads an ONNX model and the files next to it, as bytes. Their meaning is the concern of `model.ts`.
 */
import { FormatError } from "../errors.ts";
import { addressOf, openSource, watchedOf } from "../open-source.ts";
import type { OnProgress } from "../progress.ts";
import {
  type AbortOptions,
  type ByteSource,
  type FetchOptions,
  type ReadOptions,
  readAll,
  type SourceInput,
} from "../source.ts";
import { type OnnxModel, parseModel } from "./model.ts";
import type { OpenExternal } from "./tensors.ts";

/** Options for reading a model and the files next to it. */
export interface ModelOptions extends FetchOptions, AbortOptions {
  /** Told how far each file is read; takes a function for `progress_callback` of transformers.js. Bytes in memory are not told. */
  readonly onProgress?: OnProgress | undefined;
  /**
   * Chooses the file that the model calls `location` ("model.onnx_data"). Default: the file of that name next to a model given as a path
   * or URL.
   */
  external?: ((location: string) => SourceInput | Promise<SourceInput>) | undefined;
}

/** A model in memory. */
export interface ModelFile {
  readonly model: OnnxModel;
  /** The whole file, or the model without its weights; its tensors are views of it. */
  readonly bytes: Uint8Array;
  /** Folder of all files that the model's tensors point into. Undefined where it is unknown, or was not asked for. */
  readonly folder: string | undefined;
  /** Opens a file next to the model, once. Undefined when their place is unknown. */
  readonly external: OpenExternal | undefined;
  /** Closes the files next to the model. */
  close(): Promise<void>;
}

/** Smaller files are read at once. */
const LEAST_APART = 2 ** 23;

/**
 * Reads and parses a model.
 * @param options `weightsApart`: weights of a file on disk stay there, for a runtime that reads them itself
 * @throws FormatError, SourceError when it is no ONNX model or cannot be read
 */
export async function readModel(
  input: SourceInput,
  options: ModelOptions & { readonly weightsApart?: boolean | undefined } = {},
): Promise<ModelFile> {
  const { onProgress } = options;
  const opened = await openSource(input, options, "model");
  const locate = options.external ?? siblingsOf(input, opened.name);
  const apart =
    options.weightsApart === true && !options.external && locate !== undefined && opened.folder !== undefined;
  // The runtime reads the weights: there is no telling how many bytes are needed here.
  const total = apart ? (): undefined => undefined : undefined;
  const told = async (source: ByteSource): Promise<ByteSource> =>
    (await watchedOf(source, "model", onProgress, total)) ?? source;
  const source = await told(opened);
  const bytes = await readBytes(source, options, apart).finally(() => source.close?.());
  const model = await parsed(bytes, source.name);
  const files = new Map<string, Promise<ByteSource>>();
  const external = (location: string): Promise<ByteSource> => {
    let file = files.get(location);
    if (!file) {
      file = Promise.resolve(locate!(location)).then(async (found) => {
        const opened = await openSource(found, options, "external");
        // Weights that were left in the model's own file: that is told already.
        return opened.name === source.name ? opened : told(opened);
      });
      files.set(location, file);
      // A failure is not kept: the next read may find the file.
      file.catch(() => files.delete(location));
    }
    return file;
  };
  return {
    model,
    bytes,
    folder: apart ? source.folder : undefined,
    external: locate && external,
    async close() {
      const settled = await Promise.allSettled(files.values());
      files.clear();
      await Promise.all(settled.map((file) => file.status === "fulfilled" && file.value.close?.()));
    },
  };
}

async function readBytes(source: ByteSource, options: ReadOptions, apart: boolean): Promise<Uint8Array> {
  if (apart && source.byteLength! >= LEAST_APART) {
    const { skeletonOf } = await import("./skeleton.ts");
    const skeleton = await skeletonOf(source, source.name.replace(/^.*[/\\]/, ""), options);
    if (skeleton) return skeleton;
  }
  return readAll(source, options);
}

async function parsed(bytes: Uint8Array, name: string): Promise<OnnxModel> {
  try {
    const model = parseModel(bytes, name);
    const isFused = model.proto.graph!.node.some(
      ({ domain, opType }) => opType === "Attention" && domain === "com.microsoft",
    );
    return isFused ? (await import("./packed.ts")).unfuse(model) : model;
  } catch (error) {
    const { wrongKind } = await import("../format/kind.ts");
    throw await wrongKind(
      error,
      { name, byteLength: bytes.length, read: async (_, n) => bytes.subarray(0, n) },
      "an ONNX model",
    );
  }
}

/** Finds files next to a model on disk or at a URL; undefined for bytes, blobs and sources, which have no place. */
function siblingsOf(input: SourceInput, model: string): ((location: string) => SourceInput) | undefined {
  if (!(typeof input === "string" || input instanceof URL) || /^(blob|data):/i.test(String(input))) return undefined;
  // The name of a file on the Hub says the commit that it is of.
  const place = /^hf:/.test(model) ? model : input;
  return (location) => {
    // The model's author chooses the file: it must not lie outside the model's folder.
    if (/^[/\\]|^[a-z]+:|(^|[/\\])\.\.([/\\]|$)/i.test(location)) {
      const message = `lie at "${location}", outside the model's folder; give them with the option \`external\``;
      throw new FormatError(message, { file: model, part: "external data" });
    }
    const url = place instanceof URL || /^hf:/i.test(place) ? place : (addressOf(place, "model") ?? place);
    if (!(url instanceof URL)) return url.replace(/[^/\\]*$/, "") + location;
    // An address would read escapes, tabs and queries into the name.
    return new URL(location.split("/").map(encodeURIComponent).join("/"), url);
  };
}
