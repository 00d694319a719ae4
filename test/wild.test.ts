/**
 * Published adapters of strangers: every file is read, and gives the same ΔW as numpy. They may not be copied, so the test runs where
 * EIGENLORA_WILD names a folder with `sd15`, `sd2` (diffusers) and `peft`, and is skipped by name elsewhere.
 */
import { execFileSync } from "node:child_process";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { type Adapter, buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { bytesOf } from "./adapters.ts";
import { LOSSLESS } from "./packs.ts";
import { find, python, wild } from "./required.ts";

const oracle = fileURLToPath(new URL("wild-oracle.py", import.meta.url));

/** Adapters in each folder, and the first module of those of diffusers. */
const SUITES = [
  ["sd15", 7, "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"],
  ["sd2", 3, "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"],
  ["peft", 6, undefined],
] as const;

/** Writes the factors of an adapter for the oracle. */
async function writeFactors(adapter: Adapter, file: string): Promise<void> {
  const tensors = [];
  for (const { name, in: inputs, out, rank, read } of adapter.modules.values()) {
    const { A, Bt } = await read();
    tensors.push({ name: `${name} A`, dtype: "F32", shape: [rank, inputs], read: () => new Uint8Array(A.buffer) });
    tensors.push({ name: `${name} Bt`, dtype: "F32", shape: [rank, out], read: () => new Uint8Array(Bt.buffer) });
  }
  writeFileSync(file, await bytesOf(tensors));
}

for (const [suite, count, first] of SUITES) {
  const skip = !find(join(wild, suite)) && `EIGENLORA_WILD names no folder with ${suite}`;
  t.test(`adapters from the wild: ${suite}`, { skip }, async (t) => {
    t.setTimeout(300_000);
    const adapters = await readAdapters([join(wild, suite)]);
    t.equal(adapters.length, count);
    const factors = join(t.testdir(), "factors");
    mkdirSync(factors);
    for (const adapter of adapters) await writeFactors(adapter, join(factors, `${adapter.id}.safetensors`));
    const output = execFileSync(python, [oracle, join(wild, suite), factors], { encoding: "utf8" });
    const judged: [string, { modules: number; norm: number; worst: number }][] = Object.entries(JSON.parse(output));
    t.same(judged.map(([id]) => id).sort(), adapters.map(({ id }) => id).sort());
    for (const [id, { modules, norm, worst }] of judged) {
      t.ok(
        worst < 1e-6,
        `${id}: ${modules} modules, ‖ΔW‖ ${norm.toPrecision(4)}, largest error ${worst.toExponential(1)}`,
      );
    }
    if (first !== undefined) {
      for (const { id, modules } of adapters) t.same([modules.size, [...modules.keys()][0]], [128, first], id);
      const { report } = await buildPack(adapters, LOSSLESS);
      t.match(report, { tasks: count, modules: 128, adapterBytes: adapters.reduce((sum, a) => sum + a.byteLength, 0) });
      t.ok(report.error.max < 1e-5, `a lossless pack of all: ${report.error.max}`);
    }
    for (const adapter of adapters) await adapter.close();
  });
}
