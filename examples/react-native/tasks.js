// A pack and a model that lie on the device. `files` is what the app reads and writes files with; App.js makes it of
// expo-file-system.
import { openPack } from "eigenlora";
import { fileSource } from "eigenlora/react-native";
import { createEigenSession } from "eigenlora/react-native/onnxruntime";

/**
 * @typedef {object} Files
 * @property {(uri: string) => Promise<number>} size in bytes
 * @property {(uri: string, offset: number, length: number) => Promise<string | Uint8Array>} read bytes, or base64 of
 *   them
 * @property {(name: string, bytes: Uint8Array) => Promise<string>} write gives the path of the file that it wrote
 * @property {(path: string) => Promise<unknown>} remove
 */

/** @param {Files} files @param {string} uri */
const source = async (files, uri) =>
  fileSource({
    name: uri,
    byteLength: await files.size(uri),
    read: (offset, length) => files.read(uri, offset, length),
  });

/** @param {Files} files @param {string} uri */
export async function openTasks(files, uri) {
  return openPack(await source(files, uri));
}

/**
 * @param {import("eigenlora/onnxruntime").Ort} ort the module onnxruntime-react-native
 * @param {Files} files
 * @param {string} uri of the model
 * @param {import("eigenlora").Pack} pack
 */
export async function openModel(ort, files, uri, pack) {
  return createEigenSession(ort, await source(files, uri), pack, { files });
}
