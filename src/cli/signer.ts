/** What signs what commands write. */
import type { Sign } from "../format/layout.ts";
import { createSigner } from "../pack/keys.ts";
import type { Pack } from "../pack/pack.ts";
import { readText } from "./files.ts";
import type { Output } from "./output.ts";

/** @param path of a key in PEM; undefined for none */
export async function signerOf(path: string | undefined): Promise<Sign | undefined> {
  return path === undefined ? undefined : createSigner(await readText(path));
}

/** Says that a pack which was signed no longer is. */
export function warnUnsigned(pack: Pack, sign: Sign | undefined, out: Output): void {
  if (!sign && pack.window.superblock.signature)
    out.warn(`${pack.name} was signed and no longer is: sign it again, or pass --key`);
}
