/**
 * Finds the scale of a row of few-bit integers with the least rounding loss. Sums run along the row, as in
 * `src/tensor/encode.ts`, so that both find the same scale; the SIMD build takes two scales at a time.
 */

/** Values between checks whether a scale is already worse than the best. */
@inline const STRETCH: usize = 64 << 3;

/** Σ (x − scale·integer)² from `x` to `end` for two scales, added to `sums`. */
@inline
function lostPairs(x: usize, end: usize, scales: v128, largest: v128, sums: v128): v128 {
  const half = f64x2.splat(0.5), one = f64x2.splat(1);
  const least = f64x2.neg(largest);
  for (; x < end; x += 8) {
    const value = v128.load64_splat(x);
    const steps = f64x2.div(value, scales), down = f64x2.floor(steps);
    // Rounds as Math.round: exact halves go up.
    const up = v128.and(f64x2.ge(f64x2.sub(steps, down), half), one);
    const nearest = f64x2.max(least, f64x2.min(largest, f64x2.add(down, up)));
    const rest = f64x2.sub(value, f64x2.mul(scales, nearest));
    sums = f64x2.add(sums, f64x2.mul(rest, rest));
  }
  return sums;
}

@inline
function lostOf(x: usize, end: usize, scale: f64, largest: f64, sum: f64): f64 {
  for (; x < end; x += 8) {
    const value = load<f64>(x), steps = value / scale, down = floor(steps);
    const nearest = max(-largest, min(largest, steps - down >= 0.5 ? down + 1 : down));
    const rest = value - scale * nearest;
    sum += rest * rest;
  }
  return sum;
}

/** Finds which of `count` f64 scales loses least over `length` bytes of f64 values; the first of equals. */
export function bestScale(values: usize, length: usize, scales: usize, count: i32, largest: f64): i32 {
  let best = 0, least = Infinity;
  const end = values + length;
  for (let i = 0; i < count; ) {
    const at = scales + (<usize>i << 3);
    if (ASC_FEATURE_SIMD && i + 1 < count) {
      let sums = f64x2.splat(0);
      const pair = v128.load(at), most = f64x2.splat(largest), limit = f64x2.splat(least);
      for (let x = values; x < end; x += STRETCH) {
        sums = lostPairs(x, min(end, x + STRETCH), pair, most, sums);
        if (i64x2.all_true(f64x2.ge(sums, limit))) break;
      }
      for (let lane = 0; lane < 2; lane++, i++) {
        const lost = lane === 0 ? f64x2.extract_lane(sums, 0) : f64x2.extract_lane(sums, 1);
        if (lost < least) {
          least = lost;
          best = i;
        }
      }
    } else {
      let lost: f64 = 0;
      for (let x = values; x < end && lost < least; x += STRETCH) lost = lostOf(x, min(end, x + STRETCH), load<f64>(at), largest, lost);
      if (lost < least) {
        least = lost;
        best = i;
      }
      i++;
    }
  }
  return best;
}
