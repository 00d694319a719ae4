/**
 * What a caller trusts, held against what a file says, before any of it is used (SPEC.md, section 8). Loaded when `openPack` is
 * given a hash, keys or revoked tasks.
 */
import { described } from "../arguments.ts";
import { TrustError } from "../errors.ts";
import type { Directory, Section, TaskFile, Window } from "../format/format.ts";
import { integrityOf, sha256 } from "../format/hash.ts";
import { fromIntegrity, toIntegrity } from "../format/integrity.ts";
import { isSigned, keyName, type PublicKey, publicKeyBytes } from "./keys.ts";

/** Whom and what to trust. */
export interface TrustOptions {
  /**
   * The root that the pack must have: "sha256-…", as `pack.integrity()` and `eigenlora inspect` say it. Everything that is read is
   * checked against it before it is used, in the same requests. Default: no check.
   */
  readonly integrity?: string;
  /** The pack, and every task file that is added to it, must be signed by one of these keys. Default: no check. */
  readonly keys?: readonly PublicKey[];
  /** Hashes of tasks ("sha256-…", as `TaskInfo.integrity`) that must not be loaded or added. Default: none. */
  readonly revoked?: readonly string[];
}

/** What a task file must be that is added to an open pack. */
export interface TaskTrust {
  /** Hash that the file must have, "sha256-…", its signature left out. Default: no check. */
  readonly integrity?: string | undefined;
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
   * What a coded task becomes: packs of before version 1.2 have tasks that were coded anew, whose file has the hash of these bytes.
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
    if (!signature) this.#refuse("it is not signed, and `keys` were given", file);
    const name = keyName(signature.key);
    if (!this.#keys.includes(name)) this.#refuse(`it is signed by ${name}, which is none of \`keys\``, file);
    if (!(await isSigned(kind, hash, signature, file)))
      this.#refuse(`its signature by ${name} is not of these bytes`, file);
  }

  #refuse(message: string, file: string = this.#file): never {
    throw new TrustError(message, { file });
  }
}
