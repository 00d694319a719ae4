// Values of the formats of weights: 0 f32, 1 f16, 2 bf16. `build.mjs` puts it behind each kernel.

// Exact, subnormal halves included: unpack2x16float may flush them.
fn f16_value(half: u32) -> f32 {
  let sign = (half & 0x8000u) << 16u;
  let magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) {
    return bitcast<f32>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13u));
  }
  if (magnitude >= 0x400u) {
    return bitcast<f32>(sign | ((magnitude << 13u) + 0x38000000u));
  }
  return bitcast<f32>(sign | bitcast<u32>(f32(magnitude) * 5.9604644775390625e-8));
}

fn decoded(bits: u32) -> f32 {
  if (FORMAT == 0u) {
    return bitcast<f32>(bits);
  }
  if (FORMAT == 1u) {
    return f16_value(bits);
  }
  return bitcast<f32>(bits << 16u);
}
