/**
 * Memory of a process with a language model and N skills: a pack and the model. Each way runs in a process of its own.
 * Skills beyond the real ones are blends of these.
 */
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";
import { placeOf } from "../../dist/src/format/encode.js";
import { freshPack } from "../../dist/src/pack/write.js";
import { decodeTensor } from "../../dist/src/tensor/dtypes.js";
import { encodeTensor } from "../../dist/src/tensor/encode.js";
import { uniform } from "../../dist/src/tensor/random.js";
import { feedsOf, ONE_THREAD } from "./llm-steps.js";
import { peakMemory, settledMemory } from "./process.js";

/** Blobs that a pack may keep, where it reads on demand. */
const KEPT = 4e6;

/**
 * Makes a pack with a given number of tasks: those of another pack, then convex combinations of their coefficients.
 * @param {string} path
 * @param {number} count
 */
export async function blendedPack(path, count) {
  const pack = await openPack(path);
  const ids = [...pack.tasks.keys()];
  const random = uniform(7);
  const tasks = [];
  for (let i = 0; i < count; i++) {
    const [id, other] = [ids[i % ids.length], ids[Math.floor(random() * ids.length)]];
    const blob = i < ids.length ? (await pack.load(id)).bytes : await blendOf(pack, id, other, random());
    const entry = { id: i < ids.length ? id : `blend ${i}`, adapterBytes: 0, metadata: {} };
    tasks.push(await placeOf({ entry, blob }));
  }
  const { chunks } = await freshPack(pack, tasks);
  await pack.close();
  return chunks;
}

/**
 * @param {import("eigenlora").Pack} pack
 * @param {string} id
 * @param {string} other
 * @param {number} share of the other
 */
async function blendOf(pack, id, other, share) {
  const [one, two] = [await pack.load(id), await pack.load(other)];
  const bytes = one.bytes.slice();
  for (const [i, term] of one.terms.entries()) {
    for (const side of /** @type {const} */ (["A", "B"])) {
      const [a, b] = [term[side]?.tensor, two.terms[i]?.[side]?.tensor];
      if (!a || !b || a.rows !== b.rows) continue;
      const read = (
        /** @type {Uint8Array} */ from,
        /** @type {typeof a} */ { dtype, rows, width, byteOffset, byteLength },
      ) => decodeTensor(dtype, from.subarray(byteOffset, byteOffset + byteLength), rows, width);
      const [x, y] = [read(one.bytes, a), read(two.bytes, b)];
      bytes.set(
        encodeTensor(
          a.dtype,
          x.map((value, j) => (1 - share) * value + share * y[j]),
          a.rows,
          a.width,
        ),
        a.byteOffset,
      );
    }
  }
  return bytes;
}

/**
 * A session that has switched to every task once.
 * @param {string} model
 * @param {string} path of the pack; "" for the plain model
 * @param {number} sessions of the plain model
 */
export async function holdPack(model, path, sessions) {
  ort.env.logLevel = "error";
  const held = [];
  if (path === "") {
    for (let i = 0; i < sessions; i++) {
      const session = await ort.InferenceSession.create(model, ONE_THREAD);
      await session.run(feedsOf(/** @type {any} */ (ort), session, [[500, 600]], 2));
      held.push(session);
    }
  } else {
    const pack = await openPack(path, { maxResidentBytes: KEPT });
    const session = await createEigenSession(ort, model, pack, { mode: "core", session: ONE_THREAD });
    for (const [i, id] of [...pack.tasks.keys()].entries()) {
      await session.switchTask(id);
      if (i < 20) await session.run(feedsOf(/** @type {any} */ (ort), session, [[500, 600]], 2));
    }
    held.push(session, pack);
  }
  const { rss } = await settledMemory();
  return { resident: held.length > 0 ? rss : 0, peak: await peakMemory() };
}
