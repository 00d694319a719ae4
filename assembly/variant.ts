/** Which build this is: 0 scalar, 1 simd, 2 relaxed-simd. */
export const variant: i32 = ASC_FEATURE_RELAXED_SIMD ? 2 : ASC_FEATURE_SIMD ? 1 : 0;
