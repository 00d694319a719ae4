/** Fingerprints of the base model that a pack is made for. */
import type { ModuleShape } from "../adapters/adapter.ts";
import type { BaseInput } from "../core/base.ts";
import { type Located, Locator } from "../core/base.ts";
import { AliasMatcher, fingerprint, locate, weightAt } from "../core/mismatch.ts";
import { openHost } from "../core/open-base.ts";

/**
 * 64 weights of the base for each module (SPEC.md, section 4.4).
 * @throws BaseMismatchError when it does not have one
 */
export async function readFingerprints(
  base: BaseInput,
  modules: Iterable<ModuleShape>,
): Promise<Map<string, Float32Array>> {
  const host = await openHost(base);
  try {
    const locator = new Locator(host);
    locator.names = new AliasMatcher(locator.parameters.keys());
    const prints = new Map<string, Float32Array>();
    for (const module of modules) {
      const located = inBase(locator, module);
      const view = await host.read(located.name);
      const bytes = (view.data as Uint8Array).subarray(view.byteOffset);
      const values = weightAt(bytes, located.dtype, module.out, module.in, located.transposed);
      prints.set(module.name, fingerprint(module.name, module.out, module.in, values));
    }
    return prints;
  } finally {
    // The caller's own source may be read again.
    if (typeof base === "string" || base instanceof URL) await host.close?.();
  }
}

/** Says how names are mapped here: packing has no option `names`. */
function inBase(locator: Locator, module: ModuleShape): Located {
  try {
    return locate(locator, module);
  } catch (error) {
    const { message } = error as Error;
    (error as Error).message = message.replace(
      "map them with the option `names`",
      "let the base list them by the module's",
    );
    throw error;
  }
}
