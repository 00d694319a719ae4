/**
 * Models of the size that people ship, with adapters and packs: files that benchmarks make once, and keep in a folder.
 */
import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { mkdir } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { command } from "./process.js";
import { progress } from "./report.js";

/** Packs by name: the adapters, what the command is told, and what it gives. */
const PACKS = /** @type {const} */ ({
  core: ["shared", ["--k", "32", "--dtype", "int4"], "both sides shared, K 32, int4"],
  shared: ["shared", [], "A shared, default"],
  apart: ["apart", [], "nothing shared, default"],
});

/** Folders of models. */
const FORMS = { q4: "model", q4f16: "model-q4f16" };

/** Files are kept here by default. */
export const FOLDER = join(tmpdir(), "eigenlora-scale");

/**
 * Makes what is missing: Qwen2.5's shapes in 4 bits with seeded random weights, 20 LoRAs of rank 16 on all linear
 * layers of two kinds. Needs a Python (PYTHON) with onnxruntime-genai, onnx-ir, onnx, torch and transformers.
 * @param {{ size: string, folder: string, only?: string, form?: keyof typeof FORMS }} given
 */
export async function scaleFiles({ size, folder: kept, only, form = "q4" }) {
  const folder = resolve(kept, size);
  const model = join(folder, FORMS[form], "model.onnx");
  await mkdir(folder, { recursive: true });
  /** True if a script has made its files. @param {string} script @param {string[]} more */
  const made = (script, ...more) => {
    const path = fileURLToPath(new URL(script, import.meta.url));
    const { status } = spawnSync(process.env.PYTHON ?? "python3", [path, folder, size, ...more], {
      stdio: ["ignore", "ignore", "inherit"],
    });
    return status === 0;
  };
  if (!existsSync(join(folder, "apart", "19", "adapter_config.json")) || !existsSync(model)) {
    progress(`making a model of ${size} and its adapters`);
    if (!made("scale_model.py", form)) process.exit(2);
  }
  const packs = Object.entries(PACKS).filter(([name]) => !only || only === name);
  return {
    adapters: join(folder, "apart"),
    model,
    packs: packs.map(([name, pack]) => packFile(folder, name, pack)),
    /** The model for llama.cpp; undefined where it cannot be made. Needs gguf in that Python. */
    gguf: () => {
      const path = join(folder, "model.gguf");
      return existsSync(path) || made("scale_gguf.py") ? path : undefined;
    },
  };
}

/** @param {string} folder @param {string} name @param {typeof PACKS[keyof typeof PACKS]} pack */
function packFile(folder, name, [adapters, options, what]) {
  const path = join(folder, `${name}.eigen`);
  return {
    what,
    path,
    /** Packs where that was not done before. @returns {import("./report.js").Row | undefined} what it took */
    packed() {
      if (existsSync(path)) return undefined;
      progress(`packing: ${what}`);
      const { coreSeconds, peakMemoryBytes } = command("pack", join(folder, adapters), "-o", path, ...options);
      return { name: what, "CPU, s": coreSeconds, "peak, MB": peakMemoryBytes / 1e6 };
    },
  };
}
