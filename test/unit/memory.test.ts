import { spawnSync } from "node:child_process";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import t from "tap";
import { dawnMissing } from "../support/backend-list.ts";
import { folderFor, fromRoot } from "../support/folder.ts";
import { modelOf } from "../support/graphs.ts";
import { create, makeNode, makeValue } from "../support/internals/models.ts";

const child = fromRoot("test/support/memory-child.js");

for (const backend of ["js", "wasm", "webgpu"]) {
  const skip = backend === "webgpu" && ((await dawnMissing()) ?? false);
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

/** Sizes of a session in memory-child.js. */
const [SIZE, LAYERS] = [1024, 13];

/** y = x · W₀ · W₁ · … */
const model = join(folderFor(t), "model.onnx");
{
  const names = Array.from({ length: LAYERS }, (_, i) => `layers.${i}`);
  const initializer = names.map((name, i) => {
    const rawData = new Uint8Array(
      Float32Array.from({ length: SIZE * SIZE }, (_, k) => ((k * (i + 7)) % 97) / 5000).buffer,
    );
    return create("TensorProto", {
      name: `${name}.weight`,
      dataType: 1,
      dims: [BigInt(SIZE), BigInt(SIZE)],
      rawData,
    });
  });
  const value = (i: number): string => (i === 0 ? "x" : i === LAYERS ? "y" : `h${i}`);
  const node = names.map((name, i) =>
    makeNode("MatMul", `/${name}/MatMul`, [value(i), `${name}.weight`], value(i + 1)),
  );
  const [input, output] = ["x", "y"].map((name) => [makeValue(name, 1, ["batch", SIZE])]);
  writeFileSync(model, modelOf({ node, initializer, input, output }));
}

/**
 * Bytes allowed in addition to those that `memory()` counts: parsed graphs, tensors of the last run. A model's file is
 * not among them.
 */
const ALLOWANCE = 3e6;

for (const mode of ["core", "factors", "folded"]) {
  t.test(`${mode}: a session keeps what memory() says, and not the model's file`, async (t) => {
    const args = ["--expose-gc", child, mode, model];
    const { stdout, stderr } = spawnSync(process.execPath, args, { encoding: "utf8" });
    if (stdout === "") throw new Error(stderr);
    const { bytes, ...moments } = JSON.parse(stdout) as Record<"created" | "used", Record<string, number>> & {
      bytes: number;
    };
    t.ok(bytes > 50e6, `the model has ${bytes} bytes`);
    for (const [when, { measured, reported }] of Object.entries(moments)) {
      const more = measured! - reported!;
      t.ok(more < ALLOWANCE, `${when}: ${measured} bytes are held, ${reported} reported`);
      // Folding keeps the file to begin each switch from, and reports it.
      t.equal(reported! > bytes, mode === "folded", `${when}: ${reported} reported`);
    }
  });
}
