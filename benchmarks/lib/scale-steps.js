/** Parts of benchmarks/scale.js, each for a process of its own. */
import { readFile, writeFile } from "node:fs/promises";
import { basename, dirname } from "node:path";
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import { createTrainer } from "eigenlora/train";
import * as ort from "onnxruntime-node";
import { median, min } from "simple-statistics";
import { placeOf } from "../../dist/src/format/encode.js";
import { freshPack } from "../../dist/src/pack/write.js";
import { generation } from "./generation.js";
import { clocked, cpu, inFreshProcess, peakMemory, settledMemory } from "./process.js";

const ONE_THREAD = { intraOpNumThreads: 1, interOpNumThreads: 1, executionProviders: ["cpu"] };
const [PROMPT, TOKENS] = [32, 24];

ort.env.logLevel = "error";

/**
 * Reads the description by onnxruntime-genai's builder of a model, and the type of its caches.
 * @param {string} model
 */
async function decoderOf(model) {
  const config = JSON.parse(await readFile(new URL("genai_config.json", `file://${model}`), "utf8"));
  return { ...config.model.decoder, halves: basename(dirname(model)).endsWith("f16") };
}

/**
 * Creates a session, switches to every skill and makes a token.
 * @param {string} model
 * @param {string} pack "" for the plain model
 */
export async function holdModel(model, pack) {
  const decoder = await decoderOf(model);
  if (!pack) {
    const { ms, result } = await clocked(() => ort.InferenceSession.create(model, ONE_THREAD));
    const peak = await peakMemory();
    await generation(ort, result, decoder, PROMPT).next();
    return {
      "creation, s": ms / 1000,
      "peak, MB": peak / 1e6,
      "resident, MB": (await settledMemory()).rss / 1e6,
    };
  }
  const plain = inFreshProcess(new URL(import.meta.url), "holdModel", [model, ""]);
  const { ms, result } = await clocked(async () => {
    const opened = await openPack(pack);
    return createEigenSession(ort, model, opened, { session: ONE_THREAD });
  });
  const peak = await peakMemory();
  const [first, ...others] = result.tasks.keys();
  const veryFirst = await clocked(() => result.switchTask(/** @type {string} */ (first)));
  const fromFile = [];
  for (const id of others) fromFile.push((await clocked(() => result.switchTask(id))).ms);
  await generation(ort, result, decoder, PROMPT).next();
  const resident = (await settledMemory()).rss / 1e6 - plain["resident, MB"];
  const few = result.tasks.size <= 20;
  if (few) await result.pack.prefetch(result.tasks.keys());
  return {
    "creation, s": ms / 1000,
    "÷ plain": ms / 1000 / plain["creation, s"],
    "peak, MB": peak / 1e6,
    "peak ÷ plain": peak / 1e6 / plain["peak, MB"],
    "resident, MB": resident,
    ...(few && { "all, MB": (await settledMemory()).rss / 1e6 - plain["resident, MB"] }),
    "very first, ms": veryFirst.ms,
    "first, from the file, ms": median(fromFile),
    mode: result.mode,
  };
}

/**
 * Writes a pack with more tasks: those that are there, again and again under other names.
 * @param {string} from
 * @param {string} to
 * @param {number} count
 */
export async function manySkills(from, to, count) {
  const pack = await openPack(from);
  const some = await Promise.all(
    [...pack.tasks.values()].map(async ({ id, adapterBytes, metadata, brings }) => ({
      entry: { id, adapterBytes, metadata, brings },
      blob: await pack.stored(id),
    })),
  );
  const places = Array.from({ length: count }, (_, i) => {
    const { entry, blob } = some[i % some.length];
    return placeOf({ entry: { ...entry, id: `${entry.id} ${i}` }, blob });
  });
  const { bytes, chunks } = await freshPack(pack, await Promise.all(places));
  await writeFile(to, chunks);
  await pack.close();
  return bytes;
}

/** Rows to learn: how many, tokens, and how many of them are learned. */
const [ROWS, LENGTH, LEARNED] = [8, 32, 6];

/**
 * Trains a task's coefficients.
 * @param {string} model
 * @param {string} pack
 * @param {number} steps 0: a run of as many tokens in a session that cannot learn
 */
export async function learnSteps(model, pack, steps) {
  const rows = Array.from({ length: ROWS }, (_, i) =>
    Array.from({ length: LENGTH }, (_, j) => 500 + ((i * 131 + j * 37) % 4000)),
  );
  const begun = cpu();
  const session = await createEigenSession(ort, model, await openPack(pack), {
    session: ONE_THREAD,
    trainable: steps > 0,
  });
  const creation = cpu() - begun;
  if (steps === 0) {
    await generation(ort, session, await decoderOf(model), ROWS * LENGTH).next();
    return { peak: await peakMemory() };
  }
  /** @param {string[]} texts one */
  const encode = ([one]) => {
    const ids = BigInt64Array.from(one.split(" ").filter(Boolean), BigInt);
    return { input_ids: { type: /** @type {const} */ ("int64"), dims: [1, ids.length], data: ids } };
  };
  const trainer = await createTrainer(session, { encode, end: false, seed: 1 });
  const examples = rows.map((ids) => ({
    prompt: ids.slice(0, -LEARNED).join(" "),
    completion: ids.slice(-LEARNED).join(" "),
  }));
  const times = [];
  let before = cpu();
  for await (const _ of trainer.fit(examples, { steps: steps + 1, batch: ROWS })) {
    times.push(cpu() - before);
    before = cpu();
  }
  const [first, ...others] = times;
  return { creation, first, ms: min(others), peak: await peakMemory(), rows: rows.map((ids) => [ids, LEARNED]) };
}

/**
 * Switches and tokens, in turns with the plain model.
 * @param {string} model
 * @param {string} pack
 * @param {number} rounds
 */
export async function timeSteps(model, pack, rounds) {
  const decoder = await decoderOf(model);
  const plain = await ort.InferenceSession.create(model, ONE_THREAD);
  const opened = await openPack(pack);
  const session = await createEigenSession(ort, model, opened, { session: ONE_THREAD, probe: false });
  await opened.prefetch(session.tasks.keys());
  const ids = [...session.tasks.keys()];
  const cpuOf = async (/** @type {() => Promise<unknown>} */ work) => (await clocked(work)).cpu;
  const firsts = [];
  for (const id of ids) firsts.push(await cpuOf(() => session.switchTask(id)));
  /** @type {Record<"again" | "prompt" | "token" | "plain", number[]>} */
  const found = { again: [], prompt: [], token: [], plain: [] };
  for (let round = 0; round <= rounds; round++) {
    const into = round === 0 ? { again: [], prompt: [], token: [], plain: [] } : found;
    for (const id of ids.slice(0, 5)) into.again.push(await cpuOf(() => session.switchTask(id)));
    // Token by token in turns: machines change their speed within a second.
    const texts = [plain, session].map((one) => generation(ort, one, decoder, PROMPT));
    for (let step = 0; step <= TOKENS; step++) {
      const took = [0, 0];
      for (const which of step % 2 ? [0, 1] : [1, 0]) took[which] = await cpuOf(() => texts[which].next());
      (step === 0 ? into.prompt : into.token).push(took[1] / took[0]);
      if (step > 0) into.plain.push(took[0]);
    }
  }
  return {
    "first, ms": median(firsts.slice(1)),
    "again, ms": median(found.again),
    "plain token, ms": median(found.plain),
    "prompt ÷ plain": median(found.prompt),
    "token ÷ plain": median(found.token),
  };
}
