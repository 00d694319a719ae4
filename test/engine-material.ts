/** What test/engine-case.js works on: a pack of two adapters of the tiny model, with components in few bits, and the model's weights. */
import { readFile } from "node:fs/promises";
import { openHost } from "../dist/src/base/open.js";
import type { Material } from "./engine-case.js";
import { data, packOf } from "./packs.ts";

const hexOf = (bytes: Uint8Array): string => Buffer.from(bytes).toString("hex");

export async function material(): Promise<Material> {
  const path = data("sessions/base.safetensors");
  const host = await openHost(path);
  const adapters = ["sessions/adapters/two", "sessions/adapters/three"];
  // Of one layer: engines without a compiler need seconds for 500 switches of more.
  const only = (module: string): boolean => module.includes("layer.0.");
  const { bytes } = await packOf(adapters, { select: { kind: "k", k: 4 }, base: host }, only);
  const base = [];
  for (const { name, shape } of host.list()) {
    if (!only(name) && !name.includes("classifier")) continue;
    const { data, byteOffset } = await host.read(name);
    const length = 4 * shape.reduce((product, size) => product * size, 1);
    base.push({ name, shape: [...shape], hex: hexOf((data as Uint8Array).subarray(byteOffset, byteOffset + length)) });
  }
  await host.close?.();
  return { pack: hexOf(bytes), base, safetensors: hexOf(await readFile(path)), tasks: ["two", "three"] };
}
