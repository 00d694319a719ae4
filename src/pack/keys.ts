/**
 * Ed25519 keys and signatures, by the platform's WebCrypto (SPEC.md, section 8). Loaded by what signs, and by readers that were
 * given keys.
 */
import { described } from "../arguments.ts";
import { TrustError } from "../errors.ts";
import type { Signature } from "../format/format.ts";
import type { Sign } from "../format/layout.ts";
import { fromBase64, toBase64 } from "../text.ts";

/** An Ed25519 public key: PEM, the base64 of its 32 bytes with or without "ed25519:" before it, or a `CryptoKey`. */
export type PublicKey = string | CryptoKey;

/** An Ed25519 key to sign with: PEM (PKCS#8), or a pair of `CryptoKey`s. */
export type SigningKey = string | CryptoKeyPair;

/** What SubjectPublicKeyInfo has before the 32 bytes of an Ed25519 key (RFC 8410). */
const SPKI = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

const ALGORITHM = "Ed25519";

/** What a signature is made of: a word for the kind of file, and its hash. A signature of one kind is none of the other. */
function message(kind: "pack" | "task", hash: Uint8Array): Uint8Array<ArrayBuffer> {
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
 * Whether a signature is its key's. Says nothing about whose key that is.
 * @throws TrustError where the platform has no Ed25519
 */
export async function isSigned(
  kind: "pack" | "task",
  hash: Uint8Array,
  { key, bytes }: Signature,
  file: string,
): Promise<boolean> {
  const imported = await imports(file, () =>
    crypto.subtle.importKey("raw", key as BufferSource, ALGORITHM, false, ["verify"]),
  );
  return crypto.subtle.verify(ALGORITHM, imported, bytes as BufferSource, message(kind, hash));
}

/**
 * What signs with a key: pass it to `planSignature`, `planAppend`, `freshPack` and `signTaskFile`.
 * @throws TypeError when it is no such key; TrustError where the platform has no Ed25519
 * @example
 * import { readFile } from "node:fs/promises";
 * const sign = await createSigner(await readFile("key.pem", "utf8"));
 */
export async function createSigner(key: SigningKey): Promise<Sign> {
  const { privateKey, publicKey } = typeof key === "string" ? await pairOf(key) : { ...key };
  if (privateKey?.algorithm?.name !== ALGORITHM) {
    throw new TypeError(`createSigner: expected an Ed25519 key pair or PEM, got ${described(key)}`);
  }
  const name = publicKey instanceof Uint8Array ? publicKey : await publicKeyBytes(publicKey, "publicKey");
  return async (kind, hash) => {
    const signature = await crypto.subtle.sign(ALGORITHM, privateKey, message(kind, hash));
    return { key: name, bytes: new Uint8Array(signature) };
  };
}

async function pairOf(pem: string): Promise<{ privateKey: CryptoKey; publicKey: Uint8Array }> {
  const body = /-----BEGIN PRIVATE KEY-----([A-Za-z0-9+/=\s]+)-----END PRIVATE KEY-----/.exec(pem)?.[1];
  if (body === undefined) {
    throw new TypeError("the key to sign with: expected PEM, -----BEGIN PRIVATE KEY----- (eigenlora keygen makes one)");
  }
  const der = fromBase64(body.replace(/\s/g, ""));
  const privateKey = await imports("the key to sign with", () =>
    crypto.subtle.importKey("pkcs8", der, ALGORITHM, true, ["sign"]),
  );
  const { x } = await crypto.subtle.exportKey("jwk", privateKey);
  return { privateKey, publicKey: fromBase64(x!.replaceAll("-", "+").replaceAll("_", "/")) };
}

/** @throws TrustError where the platform has no Ed25519, TypeError where the key is none */
async function imports(file: string, get: () => Promise<CryptoKey>): Promise<CryptoKey> {
  try {
    return await get();
  } catch (cause) {
    const { name } = cause as Error;
    if (name === "DataError") throw new TypeError(`${file}: this is not an Ed25519 key`, { cause });
    throw new TrustError(
      "signatures need Ed25519 in WebCrypto, which is missing here; check them elsewhere, or by `integrity`",
      {
        file,
        cause,
      },
    );
  }
}
