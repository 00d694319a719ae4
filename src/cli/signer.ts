/** What signs what commands write. */

import type { Pack } from "../core/pack.ts";
import type { Sign } from "../format/layout.ts";
import { createSigner } from "../pack/keys.ts";
import { readText } from "./files.ts";
import type { Output } from "./output.ts";

/** @param path of a key in PEM; undefined for none */
export async function signerOf(path: string | undefined): Promise<Sign | undefined> {
  if (path === undefined) return undefined;
  const pem = await readText(path);
  if (pem.includes("PUBLIC KEY"))
    throw new TypeError(`${path}: this is a public key; signing takes the private one, which keygen wrote beside it`);
  return createSigner(pem).catch((cause: Error) => {
    throw cause instanceof TypeError ? new TypeError(`${path}: ${cause.message}`, { cause }) : cause;
  });
}

/** Says that a pack which was signed no longer is. */
export function warnUnsigned(pack: Pack, sign: Sign | undefined, out: Output): void {
  if (!sign && pack.window.superblock.signature)
    out.warn(`${pack.name} was signed and no longer is: sign it again, or pass --key`);
}
