/**
 * Fingerprint of a base weight: 64 values at positions that follow from the module's name (SPEC.md, section 4.4). It tells
 * another model from the same one in another number format, by correlation. It is no proof against intent.
 */
import { bf16ToF32, f16ToF32, type FloatType } from "../dtypes.ts";
import { FINGERPRINT_SIZE } from "../pack/format.ts";

/** Correlation from which two float models are the same. */
export const SAME_FLOAT = 0.999;

/**
 * The fingerprint of a weight.
 * @param bytes the weight as stored, any alignment
 * @param transposed whether it is stored as [in, out]
 */
export function fingerprint(
  name: string,
  bytes: Uint8Array,
  type: FloatType,
  out: number,
  inputs: number,
  transposed: boolean,
): Float32Array {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let x = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(name)) x = Math.imul(x ^ byte, 0x01000193);
  if (x === 0) x = 1;
  const draw = (n: number): number => {
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    return (x >>> 0) % n;
  };
  const values = new Float32Array(FINGERPRINT_SIZE);
  for (let i = 0; i < values.length; i++) {
    const [o, n] = [draw(out), draw(inputs)];
    const at = transposed ? n * out + o : o * inputs + n;
    if (type === "f32") values[i] = view.getFloat32(4 * at, true);
    else values[i] = (type === "f16" ? f16ToF32 : bf16ToF32)(view.getUint16(2 * at, true));
  }
  return values;
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
