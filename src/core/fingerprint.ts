/**
 * Fingerprint of a base weight: 64 values at positions that follow from the module's name (SPEC.md, section 4.4). It tells
 * another model from the same one in another number format, by correlation. It is no proof against intent.
 */

import { BaseMismatchError } from "../errors.ts";
import { FINGERPRINT_SIZE, type PackModule } from "../format/format.ts";
import { bf16ToF32, type FloatDtype, f16ToF32 } from "../tensor/dtypes.ts";
import { toUtf8 } from "../text.ts";

/** Correlation from which two float models are the same. */
export const SAME_FLOAT = 0.999;

/** Correlation from which a quantised model is the same as a float one. */
export const SAME_QUANTIZED = 0.95;

/** The value of a weight at output o and input n. */
export type WeightAt = (o: number, n: number) => number;

/**
 * The values of a weight as it is stored.
 * @param bytes of any alignment
 * @param transposed whether it is stored as [in, out]
 */
export function weightAt(
  bytes: Uint8Array,
  type: FloatDtype,
  out: number,
  inputs: number,
  transposed: boolean,
): WeightAt {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return (o, n) => {
    const at = transposed ? n * out + o : o * inputs + n;
    if (type === "f32") return view.getFloat32(4 * at, true);
    return (type === "f16" ? f16ToF32 : bf16ToF32)(view.getUint16(2 * at, true));
  };
}

/** The fingerprint of a module's weight. */
export function fingerprint(name: string, out: number, inputs: number, at: WeightAt): Float32Array {
  let x = 0x811c9dc5;
  for (const byte of toUtf8(name)) x = Math.imul(x ^ byte, 0x01000193);
  if (x === 0) x = 1;
  const draw = (n: number): number => {
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    return (x >>> 0) % n;
  };
  const values = new Float32Array(FINGERPRINT_SIZE);
  for (let i = 0; i < values.length; i++) {
    const o = draw(out);
    values[i] = at(o, draw(inputs));
  }
  return values;
}

/**
 * @param least correlation to accept
 * @param name of the weight in the base
 * @throws BaseMismatchError when the weight is not the one that the pack's fingerprint was taken of
 */
export function checkFingerprint(
  module: PackModule,
  name: string,
  at: WeightAt,
  bases: Uint8Array,
  least: number,
): void {
  const stored = new Float32Array(bases.slice(module.fingerprint!, module.fingerprint! + 4 * FINGERPRINT_SIZE).buffer);
  const found = correlation(stored, fingerprint(module.name, module.out, module.in, at));
  if (found >= least) return;
  throw new BaseMismatchError(
    `the base's "${name}" is not the weight that "${module.name}" was trained on: their fingerprints correlate by ` +
      `${found.toFixed(4)}, at least ${least} is expected. Use the base of the adapters, or pass anyBase: true`,
    { module: module.name, expected: least, found },
  );
}

/** Pearson correlation; 1 for equal lists, and 0 where one list is constant and they differ. */
export function correlation(a: Float32Array, b: Float32Array): number {
  if (a.every((v, i) => v === b[i])) return 1;
  const mean = (v: Float32Array): number => v.reduce((sum, x) => sum + x, 0) / v.length;
  const [ma, mb] = [mean(a), mean(b)];
  let [ab, aa, bb] = [0, 0, 0];
  a.forEach((v, i) => {
    ab += (v - ma) * (b[i]! - mb);
    aa += (v - ma) ** 2;
    bb += (b[i]! - mb) ** 2;
  });
  return aa > 0 && bb > 0 ? ab / Math.sqrt(aa * bb) : 0;
}
