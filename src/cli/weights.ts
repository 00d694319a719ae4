/**
 * Commands that leave the pack: export (back to an adapter that other tools load) and fold (merged weights).
 */
import { mkdir } from "node:fs/promises";
import { join } from "node:path";
import { peftFiles } from "../adapters/export.ts";
import { safetensorsHost } from "../base/safetensors-host.ts";
import { taskAdapter } from "../pack/expand.ts";
import { openPack } from "../pack/pack.ts";
import { createRuntime } from "../runtime/create.ts";
import { openSource } from "../source.ts";
import { openSafetensors } from "../tensor/safetensors.ts";
import { type SafetensorsEntry, writeSafetensors } from "../tensor/safetensors-writer.ts";
import { type Arguments, choice, required } from "./args.ts";
import { writeWhole } from "./files.ts";
import { bytes } from "./output.ts";
import type { Result } from "./packs.ts";

/** `export FILE --task ID --format peft -o DIR` */
export async function exportCommand(args: Arguments): Promise<Result> {
  choice(args, "format", ["peft"] as const, "peft");
  const task = required(args, "task");
  const directory = required(args, "output");
  const pack = await openPack(args.positionals[0]!);
  try {
    const adapter = await taskAdapter(pack, task);
    const { config, tensors } = await peftFiles(adapter);
    await mkdir(directory, { recursive: true });
    const text = (value: object): Uint8Array[] => [new TextEncoder().encode(`${JSON.stringify(value, null, 2)}\n`)];
    const size = await writeWhole(
      join(directory, "adapter_model.safetensors"),
      writeSafetensors(tensors, new Map([["format", "pt"]])),
    );
    await writeWhole(join(directory, "adapter_config.json"), text(config));
    if (Object.keys(adapter.metadata).length > 0)
      await writeWhole(join(directory, "task.json"), text(adapter.metadata));
    const modules = adapter.modules.size;
    return {
      json: { directory, task, modules, bytes: size },
      text: `${directory}: task "${task}", ${modules} modules, ${bytes(size)}`,
    };
  } finally {
    await pack.close();
  }
}

const DTYPES = { f32: "F32", f16: "F16", bf16: "BF16" } as const;

/** `fold FILE --task ID --base MODEL.safetensors -o OUT.safetensors` */
export async function foldCommand(args: Arguments): Promise<Result> {
  const task = required(args, "task");
  const out = required(args, "output");
  const pack = await openPack(args.positionals[0]!);
  const source = await openSource(required(args, "base"));
  try {
    const base = await openSafetensors(source);
    const runtime = await createRuntime(pack, { base: safetensorsHost(base), webgpu: false });
    try {
      const report = await runtime.switchTask(task);
      const folded = runtime.changes();
      const entries: SafetensorsEntry[] = [];
      for (const [name, { dtype, shape }] of base.tensors) {
        if (!folded.has(name)) entries.push({ name, dtype, shape, read: () => base.read(name) });
      }
      for (const [name, view] of folded) {
        const read = (): Uint8Array => (view.data as Uint8Array).subarray(view.byteOffset);
        entries.push({ name, dtype: DTYPES[view.dtype], shape: view.shape, read });
      }
      const size = await writeWhole(out, writeSafetensors(entries, base.metadata));
      return {
        json: { file: out, task, modules: report.modules, added: report.added, bytes: size },
        text: `${out}: task "${task}" in ${report.modules} modules, ${bytes(size)}`,
      };
    } finally {
      await runtime.close();
    }
  } finally {
    await source.close?.();
    await pack.close();
  }
}
