/**
 * Tensors one behind the other in a section: where each of them lies, and that together they fill it.
 */
import { type Dtype, tensorBytes } from "../tensor/dtypes.ts";
import type { TensorRef } from "./format.ts";
import { check } from "./messagepack.ts";

/**
 * @param step each begins at a multiple of it
 * @param start where the first may begin
 * @param size of the section
 * @returns `place` for the next tensor, `full` once all are placed, and where they `end`; the first two throw FormatError where sizes do not agree
 */
export function placing(
  step: number,
  start: number,
  size: number,
  file: string,
  part: string,
): { place(dtype: Dtype, rows: number, width: number): TensorRef; full(): void; end(): number } {
  let end = start;
  const fits = (condition: boolean): void =>
    check(condition, file, part, () => `its tensors need ${end} bytes, there are ${size}`);
  return {
    place(dtype, rows, width) {
      const byteOffset = Math.ceil(end / step) * step;
      const byteLength = tensorBytes(dtype, rows, width);
      end = byteOffset + byteLength;
      fits(end <= size);
      return { dtype, rows, width, byteOffset, byteLength };
    },
    full: () => fits(end === size),
    end: () => end,
  };
}
