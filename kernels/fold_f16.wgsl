// fold.wgsl for f16 weights on devices with `shader-f16`: halves are elements of their own there, and no word is shared by
// two columns or rows. out[i, j] = (base[i, j] + Σ_k left[k, i] · right[k, j]) · row_scale[i] · column_scale[j], computed in
// f32 and rounded once, to nearest even.
//
//   base, out     [rows, columns], rows `stride` elements apart, from any element of their binding
//   left, right   f32 [rank, rows] and [rank, columns]
//   scales        f32 [rows] and [columns]; each may be absent
//
// A workgroup makes a tile of HEIGHT rows by LANES columns of out, an invocation one column of it, so that an element of
// right, once in a register, serves HEIGHT rows. Rounding is done on bits: the language lets a device round a conversion
// either way. What is converted afterwards is a half already. Not every compiler has a bitcast between u32 and vec2h.

enable f16;

const LANES = 64u;
const HEIGHT = 8u;
const ROW_SCALE = 1u;
const COLUMN_SCALE = 2u;

struct Job {
  rows: u32,
  columns: u32,
  stride: u32,
  rank: u32,
  // Rows of this dispatch: from `first` to before `end`. Out and base are bound from row `first` on.
  first: u32,
  end: u32,
  // First element of each tensor in its binding.
  out: u32,
  base: u32,
  left: u32,
  right: u32,
  row_scale: u32,
  column_scale: u32,
  // Flags of the scales that are present.
  scales: u32,
}

@group(0) @binding(0) var<uniform> job: Job;
@group(0) @binding(1) var<storage, read_write> out: array<f16>;
@group(0) @binding(2) var<storage, read> left: array<f32>;
@group(0) @binding(3) var<storage, read> right: array<f32>;
@group(0) @binding(4) var<storage, read> row_scale: array<f32>;
@group(0) @binding(5) var<storage, read> column_scale: array<f32>;
@group(0) @binding(6) var<storage, read> base: array<f16>;

// Σ_k of the tile's rows, for the column of this invocation.
var<private> sums: array<f32, HEIGHT>;

struct Tile {
  row: u32,
  column: u32,
}

fn f16_bits(value: f32) -> u32 {
  let pattern = bitcast<u32>(value);
  let sign = (pattern >> 16u) & 0x8000u;
  let magnitude = pattern & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return sign | 0x7e00u;
  }
  if (magnitude >= 0x477ff000u) {
    return sign | 0x7c00u;
  }
  if (magnitude >= 0x38800000u) {
    return sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13u) & 1u)) >> 13u);
  }
  if (magnitude < 0x33000000u) {
    return sign;
  }
  // Subnormal half: its unit is 2⁻²⁴, `shift` places above the last of the f32.
  let shift = 126u - (magnitude >> 23u);
  let fraction = (magnitude & 0x7fffffu) | 0x800000u;
  return sign | ((fraction + (1u << (shift - 1u)) - 1u + ((fraction >> shift) & 1u)) >> shift);
}

fn tile_of(group: vec3u, groups: vec3u) -> Tile {
  let across = (job.columns + LANES - 1u) / LANES;
  let index = group.y * groups.x + group.x;
  return Tile(job.first + (index / across) * HEIGHT, (index % across) * LANES);
}

// Fills `sums`.
fn accumulate(tile: Tile, column: u32) {
  for (var k = 0u; k < job.rank; k++) {
    let value = right[job.right + k * job.columns + column];
    let start = job.left + k * job.rows;
    for (var i = 0u; i < HEIGHT; i++) {
      sums[i] += left[start + min(tile.row + i, job.rows - 1u)] * value;
    }
  }
}

fn folded(before: f16, sum: f32, row: u32, column: u32) -> f16 {
  if (job.rank == 0u && job.scales == 0u) {
    // Copies the bits, which arithmetic on a NaN may change.
    return before;
  }
  var value = f32(before) + sum;
  if ((job.scales & ROW_SCALE) != 0u) {
    value *= row_scale[job.row_scale + row];
  }
  if ((job.scales & COLUMN_SCALE) != 0u) {
    value *= column_scale[job.column_scale + column];
  }
  return f16(unpack2x16float(f16_bits(value)).x);
}

@compute @workgroup_size(64)
fn fold(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let tile = tile_of(group, groups);
  let column = tile.column + lane;
  if (column >= job.columns) {
    return;
  }
  accumulate(tile, column);
  for (var i = 0u; i < HEIGHT && tile.row + i < job.end; i++) {
    let at = (tile.row + i - job.first) * job.stride + column;
    out[job.out + at] = folded(base[job.base + at], sums[i], tile.row + i, column);
  }
}

// Folds where base is out: one binding, since a buffer cannot be bound for reading and for writing at once.
@compute @workgroup_size(64)
fn fold_in_place(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let tile = tile_of(group, groups);
  let column = tile.column + lane;
  if (column >= job.columns) {
    return;
  }
  accumulate(tile, column);
  for (var i = 0u; i < HEIGHT && tile.row + i < job.end; i++) {
    let at = job.out + (tile.row + i - job.first) * job.stride + column;
    out[at] = folded(out[at], sums[i], tile.row + i, column);
  }
}
