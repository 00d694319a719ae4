/**
 * Prepares models for a runtime: the protobuf without its weights, and the files that hold those. Weights are never encoded into the
 * protobuf again: tensors in the model's own file are pointed at there.
 */
import { FormatError } from "../errors.ts";
import { type ReadOptions, readAll } from "../source.ts";
import type { OnnxModel } from "./model.ts";
import { type Added, makeTensor } from "./nodes.ts";
import { ModelProtoSchema, type TensorProto, toBinary } from "./protobuf.ts";
import type { ModelFile } from "./read.ts";
import { EXTERNAL, externalFiles } from "./tensors.ts";

/** A file that the protobuf points into. */
export interface DataFile {
  readonly path: string;
  readonly data: Uint8Array;
}

/** A model in a runtime's form: the graph, and weights as views of existing memory. */
export interface DetachedModel {
  readonly bytes: Uint8Array;
  readonly files: readonly DataFile[];
  /** Folder of the files that the protobuf points into; undefined: `files` are all. */
  readonly folder?: string | undefined;
}

/** Least size of tensors that leave the protobuf; smaller ones are shapes and axes, which runtimes read while loading. */
const LEAST_DETACHED = 4096;
const OWN_FILE = "eigenlora-model";
const ADDED_FILE = "eigenlora-components";

/** Serialises a model without its weights, which its tensors keep. @param options `supplied`: files that the caller provides itself */
export async function detachWeights(
  file: ModelFile,
  added: readonly Added[],
  options: ReadOptions & { supplied?: readonly string[] } = {},
): Promise<DetachedModel> {
  const { model, bytes, folder } = file;
  const { supplied = [] } = options;
  // Runtimes take a folder, or a list of files, not both.
  if (folder !== undefined && supplied.length === 0 && (await allIn(folder, file)))
    return { bytes: embedWeights(file, added), files: [], folder };
  const locations = new Set(externalFiles(model).keys());
  const restore: (() => void)[] = [];
  for (const tensor of [...model.graph.scopes.keys()].flatMap(({ initializer }) => initializer)) {
    const { rawData } = tensor;
    if (tensor.dataLocation === EXTERNAL || rawData.length < LEAST_DETACHED || rawData.buffer !== bytes.buffer)
      continue;
    point(tensor, OWN_FILE, rawData.byteOffset - bytes.byteOffset, rawData.length);
    locations.add(OWN_FILE);
    restore.push(() => Object.assign(tensor, { externalData: [], dataLocation: 0, rawData }));
  }
  const { tensors, data } = pointAll(added);
  let proto: Uint8Array;
  try {
    proto = withInitializers(model, tensors);
  } finally {
    for (const step of restore) step();
  }
  const files: DataFile[] = added.length > 0 ? [{ path: ADDED_FILE, data }] : [];
  if (locations.delete(OWN_FILE)) files.push({ path: OWN_FILE, data: bytes });
  for (const path of supplied) locations.delete(path);
  for (const path of locations) {
    if (!file.external) {
      const message = `some weights lie in the file "${path}"; give that with the option \`external\``;
      throw new FormatError(message, { file: model.name, part: "external data" });
    }
    files.push({ path, data: await readAll(await file.external(path), options) });
  }
  return { bytes: proto, files };
}

/** True if all files that a model points into lie in a folder or below it: runtimes follow no links out of it. */
async function allIn(folder: string, { model, external }: ModelFile): Promise<boolean> {
  for (const location of externalFiles(model).keys()) {
    const found = (await external!(location)).folder;
    if (found === undefined || !`${found}/`.replaceAll("\\", "/").startsWith(`${folder}/`.replaceAll("\\", "/")))
      return false;
  }
  return true;
}

/** Serialises a model with its embedded and its added tensors inside. */
export function embedWeights({ model }: ModelFile, added: readonly Added[]): Uint8Array {
  return withInitializers(model, added.map(makeTensor));
}

/** Serialises a model with more initializers, which it does not keep. */
function withInitializers({ proto, graph }: OnnxModel, tensors: readonly TensorProto[]): Uint8Array {
  const { initializer } = graph.proto;
  const own = initializer.length;
  initializer.push(...tensors);
  try {
    return toBinary(ModelProtoSchema, proto);
  } finally {
    initializer.length = own;
  }
}

/** Points a tensor to its bytes in a file. */
export function point(tensor: TensorProto, location: string, offset: number, length: number): void {
  const entries = { location, offset: String(offset), length: String(length) };
  tensor.externalData = Object.entries(entries).map(([key, value]) => ({ key, value }));
  tensor.dataLocation = EXTERNAL;
  tensor.rawData = new Uint8Array(0);
}

/** Makes one file of all added tensors, each at a multiple of 64 bytes, since some runtimes map them. */
function pointAll(added: readonly Added[]): { tensors: TensorProto[]; data: Uint8Array } {
  let end = 0;
  const tensors = added.map(makeTensor);
  const places = tensors.map(({ rawData }) => {
    const at = Math.ceil(end / 64) * 64;
    end = at + rawData.length;
    return at;
  });
  const data = new Uint8Array(end);
  for (const [i, tensor] of tensors.entries()) {
    data.set(tensor.rawData, places[i]);
    point(tensor, ADDED_FILE, places[i]!, tensor.rawData.length);
  }
  return { tensors, data };
}
