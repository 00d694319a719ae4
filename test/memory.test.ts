import { spawnSync } from "node:child_process";
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
