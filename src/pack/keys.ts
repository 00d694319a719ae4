/**
 * Ed25519 keys to sign with, by the platform's WebCrypto (SPEC.md, section 8). Signatures are checked in `core/trust.ts`.
 */
import { described } from "../arguments.ts";
import { ALGORITHM, importKey, publicKeyBytes, signedMessage } from "../core/trust.ts";
import type { Sign } from "../format/layout.ts";
import { fromBase64 } from "../text.ts";

/** An Ed25519 key to sign with: PEM (PKCS#8), or a pair of `CryptoKey`s. */
export type SigningKey = string | CryptoKeyPair;

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
    const signature = await crypto.subtle.sign(ALGORITHM, privateKey, signedMessage(kind, hash));
    return { key: name, bytes: new Uint8Array(signature) };
  };
}

async function pairOf(pem: string): Promise<{ privateKey: CryptoKey; publicKey: Uint8Array }> {
  const body = /-----BEGIN PRIVATE KEY-----([A-Za-z0-9+/=\s]+)-----END PRIVATE KEY-----/.exec(pem)?.[1];
  if (body === undefined) {
    throw new TypeError("the key to sign with: expected PEM, -----BEGIN PRIVATE KEY----- (eigenlora keygen makes one)");
  }
  const der = fromBase64(body.replace(/\s/g, ""));
  const privateKey = await importKey("the key to sign with", () =>
    crypto.subtle.importKey("pkcs8", der, ALGORITHM, true, ["sign"]),
  );
  const { x } = await crypto.subtle.exportKey("jwk", privateKey);
  return { privateKey, publicKey: fromBase64(x!.replaceAll("-", "+").replaceAll("_", "/")) };
}
