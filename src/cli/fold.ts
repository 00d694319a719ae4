/** The command fold: weights of a base model with a task merged into them. */

import { safetensorsHost } from "../core/open-base.ts";
import { createRuntime } from "../core/runtime.ts";
import { wrongKind } from "../format/kind.ts";
import { openSource } from "../open-source.ts";
import { openSafetensors, type SafetensorsEntry, writeSafetensors } from "../tensor/safetensors.ts";
import { type Attach, command } from "./command.ts";
import { match, refuseUnknown } from "./matching.ts";
import { force, output, reading, required, task, text } from "./options.ts";
import { bytes, count } from "./output.ts";

const DTYPES = { f32: "F32", f16: "F16", bf16: "BF16" } as const;

export const fold: Attach = command({
  usage: "fold <PACK>",
  does: "Merge a task into the weights of the base model.",
  example: "fold tasks.eigen --task qa --base base.safetensors -o qa.safetensors",
  options: {
    output: output("OUT.safetensors", "The file to write."),
    force,
    task,
    base: required(reading("weights", text("MODEL.safetensors", "The base model."))),
    ...match,
  },
  reads: ["file"],
  async run([path]: [string], { output: file, force, task, base: basePath, ...options }, run) {
    const target = await run.target(file, { force, inputs: [path, basePath] });
    const pack = await run.pack(path);
    refuseUnknown(options.names, pack.modules, path);
    const source = run.closing(await openSource(basePath));
    const base = await openSafetensors(source).catch(async (error: unknown) => {
      throw await wrongKind(error, source, "a safetensors file");
    });
    const runtime = run.closing(await createRuntime(pack, { ...options, base: safetensorsHost(base), webgpu: false }));
    const { modules, added } = await runtime.switchTask(task);
    const folded = runtime.changes();
    const entries: SafetensorsEntry[] = [];
    for (const [name, { dtype, shape }] of base.tensors) {
      if (!folded.has(name)) entries.push({ name, dtype, shape, read: () => base.read(name) });
    }
    for (const [name, { dtype, shape, data, byteOffset }] of folded) {
      const read = (): Uint8Array => (data as Uint8Array).subarray(byteOffset);
      entries.push({ name, dtype: DTYPES[dtype], shape, read });
    }
    const size = await target.write(writeSafetensors(entries, base.metadata));
    return {
      json: { file, task, modules, added, bytes: size },
      text: [`${file}: task "${task}" in ${count(modules, "module")}, ${bytes(size)}`],
    };
  },
});
