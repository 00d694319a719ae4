/**
 * Signing what is there already (SPEC.md, section 8).
 */
import { checkPack } from "../arguments.ts";
import type { Pack } from "../core/pack.ts";
import { parseTaskFile } from "../core/task-file.ts";
import { encodeSignedTaskFile } from "../format/encode.ts";
import { sha256 } from "../format/hash.ts";
import { type Append, layoutSigned, type Sign } from "../format/layout.ts";

/** What to write to a pack's file so that it is signed: a superblock, nothing else. @param sign made by `createSigner` */
export async function planSignature(pack: Pack, sign: Sign): Promise<Append> {
  checkPack("planSignature", pack);
  return layoutSigned(pack, sign);
}

/**
 * A task file, signed; in the place of a signature that it may have.
 * @param sign made by `createSigner`
 * @throws FormatError when it is no task file, or damaged
 */
export async function signTaskFile(file: Uint8Array, sign: Sign): Promise<Uint8Array<ArrayBuffer>> {
  const { content } = parseTaskFile(file, "the task file");
  return encodeSignedTaskFile({ content, signature: await sign("task", await sha256(content)) });
}
