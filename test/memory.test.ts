import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import t from "tap";
import { dawnMissing } from "./backend-list.ts";

const child = fileURLToPath(new URL("memory-child.js", import.meta.url));

for (const backend of ["js", "wasm", "webgpu"]) {
  const skip = backend === "webgpu" && (dawnMissing ?? false);
  t.test(`${backend}: memory() agrees with the engine within 2 %`, { skip }, async (t) => {
    const { stdout, stderr } = spawnSync(process.execPath, ["--expose-gc", child, backend], { encoding: "utf8" });
    if (stdout === "") throw new Error(stderr);
    const { measured, reported } = JSON.parse(stdout) as { measured: number; reported: Record<string, number> };
    t.ok(measured > 50e6, `${(measured / 1e6).toFixed(1)} MB are held`);
    const off = Math.abs(reported["total"]! - measured) / measured;
    t.ok(off < 0.02, `reported ${reported["total"]}, measured ${measured}: ${(100 * off).toFixed(2)} % apart`);
    t.equal(reported["pristine"], 24 * 768 * 768 * 4);
    t.equal(reported["active"], 24 * 768 * 768 * 4);
    const { total, ...owners } = reported;
    t.equal(
      Object.values(owners).reduce((a, b) => a + b, 0),
      total,
    );
  });
}

/** Bytes beside what `memory()` counts: parsed graphs, tensors of the last run. A model's file is not among them. */
const ALLOWANCE = 3e6;

for (const mode of ["core", "factors", "folded"]) {
  t.test(`${mode}: a session keeps what memory() says, and not the model's file`, async (t) => {
    const folder = mkdtempSync(join(tmpdir(), "eigenlora-memory-"));
    t.teardown(() => rmSync(folder, { recursive: true }));
    const child = fileURLToPath(new URL("session-memory-child.js", import.meta.url));
    const args = ["--expose-gc", child, mode, join(folder, "model.onnx")];
    const { stdout, stderr } = spawnSync(process.execPath, args, { encoding: "utf8" });
    if (stdout === "") throw new Error(stderr);
    const { model, ...moments } = JSON.parse(stdout) as Record<"created" | "used", Record<string, number>> & {
      model: number;
    };
    t.ok(model > 50e6, `the model has ${model} bytes`);
    for (const [when, { measured, reported }] of Object.entries(moments)) {
      const more = measured! - reported!;
      t.ok(more < ALLOWANCE, `${when}: ${measured} bytes are held, ${reported} reported`);
      // Folding keeps the file, to begin each switch from, and says so.
      t.equal(reported! > model, mode === "folded", `${when}: ${reported} reported`);
    }
  });
}
