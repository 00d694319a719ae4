/**
 * Prepares models for a runtime: the protobuf without its weights, and the files that hold those. Weights are never
 * encoded into the protobuf again: tensors in the model's own file are pointed at there.
 */
import { FormatError } from "../errors.ts";
import { type ReadOptions, readAll } from "../source.ts";
import { toBinary } from "./protobuf.ts";
import type { ModelFile } from "./read.ts";
import { EXTERNAL, externalFiles, LEAST_DETACHED, point } from "./tensors.ts";

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

const OWN_FILE = "eigenlora-model";
const ADDED_FILE = "eigenlora-components";

/**
 * Serialises a model without its weights, which its tensors keep.
 * @param options `supplied`: files that the caller provides itself
 */
export async function detachWeights(
  file: ModelFile,
  options: ReadOptions & { supplied?: readonly string[] } = {},
): Promise<DetachedModel> {
  const { model, bytes, folder } = file;
  const { supplied = [] } = options;
  // Runtimes take a folder, or a list of files, not both.
  if (folder !== undefined && supplied.length === 0 && (await allIn(folder, file)))
    return { bytes: toBinary("ModelProto", model.proto), files: [], folder };
  const locations = new Set(externalFiles(model).keys());
  const restore: (() => void)[] = [];
  const added: (readonly [data: Uint8Array, at: number])[] = [];
  let end = 0;
  for (const tensor of [...model.graph.scopes.keys()].flatMap(({ initializer }) => initializer)) {
    const { rawData } = tensor;
    if (tensor.dataLocation === EXTERNAL || rawData.length < LEAST_DETACHED) continue;
    restore.push(() => Object.assign(tensor, { externalData: [], dataLocation: 0, rawData }));
    if (rawData.buffer === bytes.buffer) {
      point(tensor, OWN_FILE, rawData.byteOffset - bytes.byteOffset, rawData.length);
      locations.add(OWN_FILE);
      continue;
    }
    // A multiple of 64, since some runtimes map the file.
    const at = Math.ceil(end / 64) * 64;
    end = at + rawData.length;
    added.push([rawData, at]);
    point(tensor, ADDED_FILE, at, rawData.length);
  }
  let proto: Uint8Array;
  try {
    proto = toBinary("ModelProto", model.proto);
  } finally {
    for (const step of restore) step();
  }
  const data = new Uint8Array(end);
  for (const [part, at] of added) data.set(part, at);
  const files: DataFile[] = end > 0 ? [{ path: ADDED_FILE, data }] : [];
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
