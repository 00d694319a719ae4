/** VeRA and PiSSA, which PEFT trains in Python (`PYTHON` or python3) on one thread: the same rows, steps, batches and schedule. */
import { spawnSync } from "node:child_process";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { writeSafetensors } from "eigenlora/build";
import { openOnnxHost } from "eigenlora/onnx";
import { data, model } from "../../examples/minilm.js";

const SCRIPT = fileURLToPath(new URL("peers.py", import.meta.url));
const PYTHON = process.env.PYTHON ?? "python3";
const TYPES = /** @type {Record<string, string>} */ ({ f32: "F32", f16: "F16", bf16: "BF16" });

/** Why Python cannot run the peers; undefined where it can. */
export function reasonAgainst() {
  const { status, stderr, error } = spawnSync(PYTHON, ["-c", "import torch, peft, transformers"], { encoding: "utf8" });
  if (error) return `${error.message}; set PYTHON`;
  return status === 0 ? undefined : `pip install torch peft transformers (${stderr.trim().split("\n").at(-1)})`;
}

/**
 * @param {object} job as peers.py describes it, without base and config
 * @returns {Promise<{ version: string, trained: number, head: number, loss: number[], logits: number[][] }>}
 * @throws Error with the end of what Python wrote when it fails
 */
export async function runPeer(job) {
  const folder = await mkdtemp(join(tmpdir(), "eigenlora-paper-"));
  try {
    const base = join(folder, "base.safetensors");
    await writeFile(base, await encoderOf(model));
    const env = { ...process.env, OMP_NUM_THREADS: "1", MKL_NUM_THREADS: "1" };
    const input = JSON.stringify({ ...job, base, config: data("minilm") });
    const { status, stdout, stderr } = spawnSync(PYTHON, [SCRIPT], {
      encoding: "utf8",
      env,
      input,
      maxBuffer: 2 ** 28,
    });
    if (status !== 0) throw new Error(`peers.py: ${stderr.trim().split("\n").slice(-3).join(" ")}`);
    return JSON.parse(stdout.trim().split("\n").at(-1) ?? "");
  } finally {
    await rm(folder, { recursive: true });
  }
}

/** The encoder's weights as PyTorch has them; the head is the task's own. @param {string} path of the ONNX model */
async function encoderOf(path) {
  const host = await openOnnxHost(path);
  const entries = [...host.list()]
    .filter(({ name }) => !name.startsWith("classifier"))
    .map(({ name, shape, dtype, layout }) => {
      const turned = layout === "in-out";
      return {
        name: name.replace(/^bert\./, ""),
        dtype: TYPES[dtype],
        shape: turned ? [...shape].reverse() : shape,
        read: async () => {
          const bytes = /** @type {Uint8Array} */ ((await host.read(name)).data);
          return turned ? transpose(bytes, shape) : bytes;
        },
      };
    });
  const chunks = [];
  for await (const chunk of writeSafetensors(entries)) chunks.push(chunk);
  await host.close?.();
  return Buffer.concat(chunks);
}

/** @param {Uint8Array} bytes @param {readonly number[]} shape */
function transpose(bytes, [rows, columns]) {
  const size = bytes.length / (rows * columns);
  const out = new Uint8Array(bytes.length);
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++)
      out.set(bytes.subarray((r * columns + c) * size, (r * columns + c + 1) * size), (c * rows + r) * size);
  }
  return out;
}
