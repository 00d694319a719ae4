/** Memory of N skills, ours and the peers': starts the processes, and makes rows of their figures. */
import { stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { findAdapters } from "eigenlora/node";
import { findLlama, ggufAdapters } from "./llm-llama.js";
import { blendedPack } from "./llm-memory.js";
import { peerLine, python } from "./peers.js";
import { inFreshProcess } from "./process.js";
import { progress } from "./report.js";
import { smollm2File } from "./skills.js";

/**
 * @typedef {{ resident: number, peak: number }} Held
 * @typedef {import("./report.js").Row} Row
 * @typedef {import("./report.js").Peer} Peer
 * @typedef {{ pack: string, gguf: string | undefined, adapters: string, scratch: string, quick: boolean }} What
 *   adapters: folder
 */

/** Most skills of the peers, whose time for the n-th adapter grows with n. */
const PEERS_UP_TO = 100;

/** @param {What} what @returns {Promise<{ rows: Row[], peers: Peer[] }>} */
export async function memoryRows(what) {
  const counts = what.quick ? [1, 20] : [1, 20, 100, 1000];
  const few = counts.filter((count) => count <= PEERS_UP_TO);
  const [peft, llama] = [await ofPeft(what, few), await ofLlama(what, few)];
  const rows = [...(await ofPacks(what, counts)), ...ofModels(what.quick ? 1 : 2), ...peft.rows, ...llama.rows];
  return { rows, peers: [peft.peer, llama.peer] };
}

/** @param {string} name @param {Held} held @param {Held | undefined} base without skills @param {object} [more] */
function rowOf(name, { resident, peak }, base, more) {
  return {
    name,
    "resident, MB": resident / 1e6,
    "peak, MB": peak / 1e6,
    ...(base && { "skills, MB": (resident - base.resident) / 1e6 }),
    ...more,
  };
}

/** @param {string} name @param {readonly unknown[]} args @param {string} file whose function it is @returns {Held} */
const inProcess = (name, args, file = "llm-memory.js") =>
  inFreshProcess(new URL(file, import.meta.url), name, /** @type {string[]} */ (args));

/** @param {What} what @param {readonly number[]} counts */
async function ofPacks({ pack, scratch }, counts) {
  const model = smollm2File("onnx/model.onnx");
  progress("memory: packs");
  const rows = [];
  let twenty = 0;
  for (const count of counts) {
    const file = join(scratch, `${count}.eigen`);
    await writeFile(file, await blendedPack(pack, count));
    const held = inProcess("holdPack", [model, file, 1]);
    if (count === 20) twenty = held.resident;
    const ratio = twenty > 0 ? { "÷ 20 skills": held.resident / twenty } : {};
    const disk = { "disk, MB": (await stat(file)).size / 1e6 };
    rows.push(rowOf(`a pack, ${count} skills`, held, undefined, { ...disk, ...ratio }));
  }
  return rows;
}

/** Models with a skill merged in are as large as the base. @param {number} most */
function ofModels(most) {
  const model = smollm2File("onnx/model.onnx");
  const counts = Array.from({ length: most }, (_, i) => i + 1);
  return counts.map((count) => {
    progress(`memory: ${count} merged models`);
    return rowOf(`${count} merged model${count > 1 ? "s" : ""}`, inProcess("holdPack", [model, "", count]), undefined);
  });
}

/** @param {What} what @param {readonly number[]} counts @returns {Promise<{ rows: Row[], peer: Peer }>} */
async function ofPeft({ adapters }, counts) {
  const folders = (await findAdapters([adapters])).map(({ path }) => path);
  /** @type {Held[]} */
  const held = [];
  for (const count of [0, ...counts]) {
    progress(`memory: PEFT, ${count} adapters`);
    const peer = python("llm_memory.py", [smollm2File(""), String(count), ...folders]);
    if ("reason" in peer) return { rows: [], peer: peerLine("PEFT", peer) };
    held.push(peer.figures);
    if (count === counts.at(-1)) {
      const rows = counts.map((n, i) => rowOf(`PEFT, ${n} adapters`, held[i + 1], held[0]));
      return { rows, peer: peerLine("PEFT", peer) };
    }
  }
  return { rows: [], peer: { name: "PEFT", reason: "nothing to hold" } };
}

/** @param {What} what @param {readonly number[]} counts @returns {Promise<{ rows: Row[], peer: Peer }>} */
async function ofLlama({ pack, gguf, scratch }, counts) {
  const peer = await findLlama(() => gguf);
  if (!gguf || "reason" in peer) return { rows: [], peer };
  progress("memory: llama.cpp");
  const base = inProcess("holdLlama", [gguf, ""], "llm-llama.js");
  const rows = [];
  for (const count of counts) {
    const folder = join(scratch, `gguf-${count}`);
    await ggufAdapters(pack, count, folder);
    rows.push(
      rowOf(`llama.cpp (Q4_1), ${count} adapters`, inProcess("holdLlama", [gguf, folder], "llm-llama.js"), base),
    );
  }
  return { rows, peer };
}
