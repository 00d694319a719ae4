/**
 * Checks a file against what a caller trusts, before any of it is used (SPEC.md, section 8), with hashes and Ed25519
 * signatures of the platform's WebCrypto. Loaded when `openPack` is given a hash, keys or revoked tasks.
 */
import { described, TrustError } from "../errors.ts";
import { fromIntegrity, integrityOf, sha256, toIntegrity } from "../format/fields.ts";
import type { Directory, Section, Signature, TaskFile, Window } from "../format/format.ts";
import type { AbortOptions } from "../source.ts";
import { fromBase64, toBase64 } from "../text.ts";

/** An Ed25519 public key: PEM, the base64 of its 32 bytes with or without "ed25519:" before it, or a `CryptoKey`. */
export type PublicKey = string | CryptoKey;

/** Hashes and keys to trust. */
export interface TrustOptions {
  /**
   * The root that the pack must have: "sha256-…", as `pack.integrity()` and `eigenlora inspect` say it. Everything that
   * is read is checked against it before it is used, in the same requests. Default: no check.
   */
  readonly integrity?: string;
  /** The pack, and every task file that is added to it, must be signed by one of these keys. Default: no check. */
  readonly keys?: readonly PublicKey[];
  /** Hashes of tasks ("sha256-…", as `TaskInfo.integrity`) that must not be loaded or added. Default: none. */
  readonly revoked?: readonly string[];
}

/** Options of `addTask`. */
export interface AddTaskOptions extends AbortOptions {
  /** Hash that the file must have, "sha256-…", its signature left out. Default: no check. */
  readonly integrity?: string | undefined;
}

/** The root of a pack, "sha256-…". @throws TypeError where the platform has no WebCrypto */
export function rootOf(head: Uint8Array, directory: Uint8Array): Promise<string> {
  return integrityOf(head, directory);
}

/** The options of one open pack, checked. */
export class Trust {
  readonly #file: string;
  readonly #integrity: string | undefined;
  readonly #keys: readonly string[] | undefined;
  readonly #revoked: ReadonlySet<string>;

  private constructor(file: string, options: TrustOptions, keys: readonly string[] | undefined) {
    this.#file = file;
    this.#integrity = options.integrity;
    this.#keys = keys;
    this.#revoked = new Set(options.revoked);
  }

  /** @throws TypeError for a hash or key that is none */
  static async create(file: string, options: TrustOptions): Promise<Trust> {
    const { integrity, keys, revoked = [] } = options;
    for (const list of [keys ?? [], revoked]) {
      if (!Array.isArray(list)) throw new TypeError(`openPack: keys and revoked are arrays, got ${described(list)}`);
    }
    for (const hash of integrity === undefined ? revoked : [integrity, ...revoked]) fromIntegrity(hash);
    const names = keys && (await Promise.all(keys.map((key, i) => publicKeyBytes(key, `keys[${i}]`))));
    return new Trust(file, options, names?.map(keyName));
  }

  get #whole(): boolean {
    return this.#integrity !== undefined || this.#keys !== undefined;
  }

  /**
   * Before the directory is decoded.
   * @throws TrustError for another root, a pack that is not signed, or not by one of the keys
   */
  async checkRoot({ head, superblock }: Window, directory: Uint8Array): Promise<void> {
    if (!this.#whole) return;
    const root = await sha256(head, directory);
    if (this.#integrity !== undefined && toIntegrity(root) !== this.#integrity) {
      this.#refuse(`its root is ${toIntegrity(root)}, expected ${this.#integrity}: it is another pack or version`);
    }
    await this.#checkSignature("pack", root, superblock.signature, this.#file);
  }

  /** @throws TrustError for a pack without hashes, where all that is read is to be held against them */
  checkHashes({ bases }: Pick<Directory, "bases">): void {
    if (this.#whole && bases.integrity === undefined)
      this.#refuse("it has no hashes, so it cannot be checked; write it anew with `eigenlora compact`");
  }

  /** @throws TrustError when the bytes are not those of the section, or of a task that is revoked */
  async checkSection({ integrity }: Pick<Section, "integrity">, bytes: Uint8Array, part: string): Promise<void> {
    const found = await integrityOf(bytes);
    if (this.#whole && found !== integrity) this.#refuse(`${part} has the hash ${found}, expected ${integrity}`);
    this.#refuseRevoked(found, part);
  }

  /**
   * Checks a decoded task: packs before version 1.2 recoded tasks, and `revoked` may list the hash of the decoded
   * bytes.
   * @throws TrustError when it is revoked
   */
  async checkDecoded(bytes: Uint8Array, part: string, file?: string): Promise<void> {
    if (this.#revoked.size > 0) this.#refuseRevoked(await integrityOf(bytes), part, file);
  }

  /**
   * A task file that is to be added.
   * @param integrity hash of the file without its signature, where the caller said one
   */
  async checkTaskFile({ content, blob, signature }: TaskFile, file: string, integrity?: string): Promise<void> {
    const hash = await sha256(content);
    if (integrity !== undefined && toIntegrity(hash) !== toIntegrity(fromIntegrity(integrity))) {
      this.#refuse(`its hash is ${toIntegrity(hash)}, expected ${integrity}`, file);
    }
    await this.#checkSignature("task", hash, signature, file);
    this.#refuseRevoked(await integrityOf(blob), "its task", file);
  }

  #refuseRevoked(hash: string, part: string, file?: string): void {
    if (this.#revoked.has(hash)) this.#refuse(`${part} is revoked (${hash})`, file);
  }

  async #checkSignature(
    kind: "pack" | "task",
    hash: Uint8Array,
    signature: Window["superblock"]["signature"],
    file: string,
  ): Promise<void> {
    if (!this.#keys) return;
    if (!signature) this.#refuse("it is not signed by any of `keys`", file);
    const name = keyName(signature.key);
    if (!this.#keys.includes(name)) this.#refuse(`it is signed by ${name}, which is none of \`keys\``, file);
    if (!(await isSigned(kind, hash, signature, file)))
      this.#refuse(`its signature by ${name} is not of these bytes`, file);
  }

  #refuse(message: string, file: string = this.#file): never {
    throw new TrustError(message, { file });
  }
}

/** Bytes of SubjectPublicKeyInfo before the 32 of an Ed25519 key (RFC 8410). */
const SPKI = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

export const ALGORITHM: string = "Ed25519";

/** Joins what is signed: a word for the kind of file, and its hash, so that a signature of a pack is none of a task. */
export function signedMessage(kind: "pack" | "task", hash: Uint8Array): Uint8Array<ArrayBuffer> {
  const word = new TextEncoder().encode(`eigenlora ${kind}\n`);
  const bytes = new Uint8Array(word.length + hash.length);
  bytes.set(word);
  bytes.set(hash, word.length);
  return bytes;
}

/**
 * The 32 bytes of a public key.
 * @param name of the option, for the message
 * @throws TypeError when it is none
 */
export async function publicKeyBytes(key: PublicKey, name: string): Promise<Uint8Array> {
  const refuse = (found: string): never => {
    throw new TypeError(`${name}: expected an Ed25519 public key (PEM, or base64 of its 32 bytes), got ${found}`);
  };
  if (typeof key !== "string") {
    if (key?.algorithm?.name !== ALGORITHM || key.type !== "public") refuse(described(key).slice(0, 60));
    return new Uint8Array(await crypto.subtle.exportKey("raw", key));
  }
  if (key.includes("PRIVATE KEY")) refuse("a private key: give the public one, and keep the private one to yourself");
  let bytes: Uint8Array | undefined;
  try {
    bytes = fromBase64(key.replace(/-----[A-Z ]+-----|^\s*ed25519:|\s/g, ""));
  } catch {
    refuse(described(key).slice(0, 60));
  }
  if (bytes!.length === SPKI.length + 32 && SPKI.every((byte, i) => byte === bytes![i]))
    return bytes!.subarray(SPKI.length);
  return bytes!.length === 32 ? bytes! : refuse(described(key).slice(0, 60));
}

/** A public key as people compare it: "ed25519:" and base64. */
export function keyName(key: Uint8Array): string {
  return `ed25519:${toBase64(key)}`;
}

/**
 * True if a signature is its key's. Says nothing about whose key that is.
 * @throws TrustError where the platform has no Ed25519
 */
export async function isSigned(
  kind: "pack" | "task",
  hash: Uint8Array,
  { key, bytes }: Signature,
  file: string,
): Promise<boolean> {
  const imported = await importKey(file, () =>
    crypto.subtle.importKey("raw", key as BufferSource, ALGORITHM, false, ["verify"]),
  );
  return crypto.subtle.verify(ALGORITHM, imported, bytes as BufferSource, signedMessage(kind, hash));
}

/** @throws TrustError where the platform has no Ed25519, TypeError where the key is none */
export async function importKey(file: string, get: () => Promise<CryptoKey>): Promise<CryptoKey> {
  try {
    return await get();
  } catch (cause) {
    const { name } = cause as Error;
    if (name === "DataError") throw new TypeError(`${file}: this is not an Ed25519 key`, { cause });
    throw new TrustError(
      "signatures need Ed25519 in WebCrypto, which is missing here; check them elsewhere, or by `integrity`",
      { file, cause },
    );
  }
}
