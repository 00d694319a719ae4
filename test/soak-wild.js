/**
 * Published LoRAs of strangers for Stable Diffusion 1.5 and 2: all of a folder as one lossless pack, switched on a UNet with their names
 * and real widths. Every task's weights are within 1e-5 of diffusers' own loading, and the base is restored to the bit. Needs
 * EIGENLORA_WILD, a folder with `sd15` and `sd2`, and PYTHON with diffusers; skipped by name without.
 */
import { spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { createReadStream, createWriteStream, existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { fileURLToPath } from "node:url";
import { createRuntime, openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import "./load-typescript.js";

const { openSafetensors, openSource, writeSafetensors } = await import("./internals.ts");

const wild = process.env["EIGENLORA_WILD"];
const oracle = fileURLToPath(new URL("wild-diffusers.py", import.meta.url));

/** @param {string} path */
async function digest(path) {
  const hash = createHash("sha256");
  for await (const chunk of createReadStream(path)) hash.update(chunk);
  return hash.digest("hex");
}

/** @param {string} suite */
async function check(suite) {
  const folder = join(String(wild), suite);
  const work = mkdtempSync(join(tmpdir(), "eigenlora-wild-"));
  const [base, folded] = [join(work, "base.safetensors"), join(work, "folded.safetensors")];
  const python = spawn(process.env["PYTHON"] ?? "python3", [oracle, folder, base, suite], {
    stdio: ["pipe", "pipe", "inherit"],
  });
  const answers = createInterface({ input: python.stdout })[Symbol.asyncIterator]();
  const next = async () => String((await answers.next()).value);
  try {
    if ((await next()) !== "ready") throw new Error("diffusers did not make the UNet");
    const adapters = await readAdapters([folder]);
    const { chunks, report } = await buildPack(adapters, {
      select: { kind: "energy", share: 1 },
      dtype: { basis: "f32", coefficients: "f32", head: "f32" },
    });
    for (const adapter of adapters) await adapter.close();
    const pack = await openPack(new Blob(/** @type {BlobPart[]} */ (chunks)));
    const source = await openSource(base);
    const file = await openSafetensors(source);
    const shapes = new Map([...file.tensors].map(([name, { shape }]) => [name, [...shape]]));
    await source.close?.();
    const runtime = await createRuntime(pack, { base });
    const write = () => {
      const entries = [...shapes].map(([name, shape]) => ({
        name,
        dtype: "F32",
        shape,
        read: async () => {
          const { data, byteOffset } = await runtime.readWeight(name);
          const bytes = /** @type {Uint8Array} */ (data);
          return bytes.slice(byteOffset, byteOffset + 4 * shape.reduce((a, b) => a * b, 1));
        },
      }));
      return pipeline(Readable.from(writeSafetensors(entries)), createWriteStream(folded));
    };
    await write();
    const pristine = await digest(folded);
    for (const { id } of pack.tasks.values()) {
      await runtime.switchTask(id);
      await write();
      python.stdin.write(`${id} ${folded}\n`);
      const off = Number(await next());
      console.log(`${suite}/${id}: off by ${off.toExponential(1)}`);
      if (!(off <= 1e-5)) throw new Error(`${suite}/${id}: ${off} from diffusers' own loading`);
    }
    await runtime.switchTask(null);
    await write();
    if ((await digest(folded)) !== pristine) throw new Error(`${suite}: the base did not come back`);
    await runtime.close();
    await pack.close();
    console.log(`${suite}: ${report.tasks} tasks, ${report.modules} modules, the base is back to the bit`);
  } finally {
    python.stdin.end();
    rmSync(work, { recursive: true, force: true });
  }
}

for (const suite of ["sd15", "sd2"]) {
  if (wild === undefined || !existsSync(join(wild, suite)))
    console.log(`skipped: EIGENLORA_WILD names no folder with ${suite}`);
  else await check(suite);
}
