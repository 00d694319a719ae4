/**
 * Layout of the first 64 KiB of linear memory. Blocks of the backend begin after it, and there is no static data, so it
 * holds nothing else. Defines also the codes shared with `src/backends/wasm.ts`.
 */

/** Part of left of four rows, f32 [rank, 4]; and the most ranks that it has room for. */
@inline export const LEFT: usize = 64;
@inline export const MOST_RANK: i32 = 1020;

/** Partial sums in f64: one per row or column of a panel. Address 0 stays free: it means "absent". */
@inline export const SUMS: usize = 16384;

/** f32 panel of decoded values, 32 KiB: small enough to stay in a first-level cache. */
@inline export const PANEL: usize = 32768;
@inline export const PANEL_VALUES: i32 = 8192;

/** Tensor types: index in DTYPES of `src/tensor/dtypes.ts`. */
@inline export const F32: i32 = 0;
@inline export const F16: i32 = 1;
@inline export const BF16: i32 = 2;
@inline export const INT8: i32 = 3;
@inline export const INT4: i32 = 4;
@inline export const INT3: i32 = 5;
