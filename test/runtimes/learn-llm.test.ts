/**
 * Gradients of language models by their exporters, Qwen 2 and 3, Gemma 2 and 3, T5 with encoder and decoder in one
 * graph, against PyTorch's in f64. The cases are made here, which takes minutes: a soak (npm run soak -- learn-llm).
 * PYTHON needs onnx too.
 */
import { spawnSync } from "node:child_process";
import { readdirSync } from "node:fs";
import { join } from "node:path";
import t from "tap";
import { compare, golden, prepare, run, sessionOf } from "../support/learning.ts";
import { data } from "../support/packs.ts";
import { gradients, python, skip, soak } from "../support/required.ts";
import { ORTS } from "../support/sessions.ts";

const TOLERANCE = 2e-5;
/** Kinds that must be among the exporters' files, written by TorchScript. */
const KINDS = ["qwen2", "qwen3", "gemma2", "gemma3", "t5-relu", "t5-gated-gelu"];

/** Makes the cases; a folder that has them already may be given. */
function made(folder: string): { cases: string[]; missing?: string } {
  if (gradients === undefined) {
    const env = { ...process.env, LLM: "1", ONLY: "qwen,gemma,t5", OMP_NUM_THREADS: "1" };
    const script = data("make/make_gradient_goldens.py");
    const { status, stderr, error } = spawnSync(python, [script, folder], {
      ...{ encoding: "utf8", cwd: folder, env },
      maxBuffer: 1e8,
    });
    if (error || status !== 0) return { cases: [], missing: `${error?.message ?? stderr.trim().split("\n").at(-1)}` };
  }
  const from = gradients ?? folder;
  return {
    cases: readdirSync(from)
      .sort()
      .map((name) => join(from, name)),
  };
}

t.test(
  "loss and gradients of language models are PyTorch's",
  { skip: soak ? false : "a soak: npm run soak -- learn-llm", timeout: 1_800_000 },
  async (t) => {
    const { cases, missing } = made(t.testdir());
    if (missing !== undefined) return skip(t, "peft", `the cases cannot be made: ${missing}`);
    for (const kind of KINDS)
      t.ok(
        cases.some((path) => path.endsWith(`/${kind}-torchscript`)),
        kind,
      );
    for (const path of cases) {
      const of = await golden(path);
      const prepared = await prepare(of);
      for (const { name, ort } of ORTS) {
        for (const level of ["disabled", "all"] as const) {
          const session = await sessionOf(ort, prepared.file, level);
          const results = await run(session, ort, prepared.feeds);
          const { loss, gradients, worst } = compare(of, prepared, (output) => results[output]!.data as Float32Array);
          await session.release();
          const what = `${path.split("/").at(-1)}, ${name}, optimisations ${level}`;
          t.ok(loss <= TOLERANCE, `${what}: loss off by ${loss.toExponential(1)}`);
          t.ok(gradients <= TOLERANCE, `${what}: gradients off by ${gradients.toExponential(1)} at most (${worst})`);
        }
      }
    }
  },
);
