/**
 * Times a step of learning on the device, compared with PyTorch. The same coefficients (K 16, r 8) of the same model
 * begin with the same task and see the same batches: through onnxruntime-node, in torch, and as PEFT's LoRA (r 8), all
 * with one thread, in turns. Also a run of the serving session on a batch, and the memory of processes that serve and
 * that train.
 */
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { openPack } from "eigenlora";
import { data } from "../examples/minilm.js";
import { folderOf, packOfK, safetensorsOf, withAdapters } from "./lib/adapters.js";
import { number, readArguments } from "./lib/arguments.js";
import { peerLine, startPython } from "./lib/peers.js";
import { inFreshProcess, inScratch } from "./lib/process.js";
import { print } from "./lib/report.js";
import { HELD_RUNS, measureCreation, WAYS } from "./lib/step-sessions.js";
import { CASES, RATE, STEPS_OF_A_ROUND, takeTurns } from "./lib/step-turns.js";
import { baseEntries, taskEntries } from "./lib/torch.js";

const { json, rounds } = readArguments("What does a step of learning on the device take, compared with PyTorch?", {
  rounds: number(`rounds of ${STEPS_OF_A_ROUND} steps, after the first`, 7, 1),
});

await inScratch(async (folder) => {
  const file = join(folder, "tasks.eigen");
  await writeFile(file, await withAdapters([folderOf("own-seed")], (adapters) => packOfK(adapters, 16)));
  const pack = await openPack(file);
  const paths = ["base", "task"].map((name) => join(folder, `${name}.safetensors`));
  await writeFile(paths[0], await safetensorsOf(await baseEntries()));
  await writeFile(paths[1], await safetensorsOf(await taskEntries(pack)));
  const torch = await startPython("step.py", [data("minilm/config.json"), ...paths, String(RATE)]);
  const rows = [];
  for (const shape of CASES) rows.push(await takeTurns(pack, shape, rounds, "ask" in torch ? torch : undefined));
  if ("stop" in torch) torch.stop();
  const steps = {
    question: `How long does a training step take? MiniLM, K 16, r 8, one thread each; median of ${rounds * STEPS_OF_A_ROUND} steps, in turns.`,
    rows,
    notes: [
      "step: loss, gradients, clipping and AdamW, in ms; tokens are made before. forward: a run of the serving session on the same",
      "batch. CPU: time of all threads of the process, which others on the machine do not lengthen. Losses are ours and torch's,",
      "which began with the same numbers and saw the same batches.",
    ],
  };
  const creation = await measureCreation(pack, rounds);
  await pack.close();
  print(json, [steps, creation, memory(file)], [peerLine("torch", torch)]);
});

/**
 * Peak memory of processes that serve and that train.
 * @param {string} file the pack
 * @returns {import("./lib/report.js").Part}
 */
function memory(file) {
  const module = new URL("lib/step-sessions.js", import.meta.url);
  const peaks = WAYS.map((way) => inFreshProcess(module, "peakOf", [way, file]) / 1e6);
  return {
    question: `How much memory does a process hold at most? ${HELD_RUNS} batches of 16 rows of 32 tokens, a fresh process each.`,
    rows: WAYS.map((name, i) => ({
      name,
      "peak, MB": peaks[i],
      "÷ plain": peaks[i] / peaks[0],
      "÷ trainable": peaks[i] / peaks[1],
    })),
    notes: ["Peak resident set of the whole process: Node with the packages loaded, the model, the pack."],
  };
}
