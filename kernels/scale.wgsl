// DoRA's scale of one axis: out[i] = magnitude[i] / ‖(base + leftᵀ·right)[i, :]‖₂ over rows, or over [:, j] over
// columns. A zero norm or magnitude gives 0; NaN stands for another scale that is no normal f32.
//
//   base          [rows, columns] of f32, f16 or bf16, rows `stride` elements apart, from any element of its binding
//   left, right   f32 [rank, rows] and [rank, columns]
//   magnitude     f32 [rows] or [columns]
//   out           the bits of as many f32, since shaders may take it that no f32 is NaN
//
// A workgroup sums the squares of one row, or of ACROSS columns, in f32: partial sums of its invocations, then a tree.

// 0 f32, 1 f16, 2 bf16.
override FORMAT: u32 = 0;

const LANES = 256u;
const ACROSS = 16u;

struct Job {
  rows: u32,
  columns: u32,
  stride: u32,
  rank: u32,
  // First element of each tensor in its binding.
  out: u32,
  base: u32,
  left: u32,
  right: u32,
  magnitude: u32,
}

@group(0) @binding(0) var<uniform> job: Job;
@group(0) @binding(1) var<storage, read_write> out: array<u32>;
@group(0) @binding(2) var<storage, read> left: array<f32>;
@group(0) @binding(3) var<storage, read> right: array<f32>;
@group(0) @binding(4) var<storage, read> magnitude: array<f32>;
@group(0) @binding(5) var<storage, read> base: array<u32>;

var<workgroup> partial: array<f32, LANES>;

fn weight(row: u32, column: u32) -> f32 {
  let index = job.base + row * job.stride + column;
  if (FORMAT == 0u) {
    return bitcast<f32>(base[index]);
  }
  return decoded((base[index >> 1u] >> ((index & 1u) * 16u)) & 0xffffu);
}

fn square(row: u32, column: u32) -> f32 {
  var sum = 0.0;
  for (var k = 0u; k < job.rank; k++) {
    sum += left[job.left + k * job.rows + row] * right[job.right + k * job.columns + column];
  }
  let value = weight(row, column) + sum;
  return value * value;
}

// Adds the partial sums that lie `least`, 2·least, … apart; the results are the first `least`.
fn reduce(lane: u32, least: u32) {
  for (var half = LANES / 2u; half >= least; half /= 2u) {
    workgroupBarrier();
    if (lane < half) {
      partial[lane] += partial[lane + half];
    }
  }
}

fn put(index: u32, squares: f32) {
  var bits = 0u;
  if (squares > 0.0) {
    let given = magnitude[job.magnitude + index];
    bits = bitcast<u32>(given / sqrt(squares));
    // The least exponent is that of 0 and subnormals, the greatest that of infinity and NaN.
    if (given != 0.0 && ((bits + 0x800000u) & 0x7f000000u) == 0u) {
      bits = 0x7fc00000u;
    }
  }
  out[job.out + index] = bits;
}

@compute @workgroup_size(256)
fn scale_rows(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let row = group.y * groups.x + group.x;
  var sum = 0.0;
  if (row < job.rows) {
    for (var column = lane; column < job.columns; column += LANES) {
      sum += square(row, column);
    }
  }
  partial[lane] = sum;
  reduce(lane, 1u);
  if (lane == 0u && row < job.rows) {
    put(row, partial[0]);
  }
}

@compute @workgroup_size(256)
fn scale_columns(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let column = (group.y * groups.x + group.x) * ACROSS + lane % ACROSS;
  var sum = 0.0;
  if (column < job.columns) {
    for (var row = lane / ACROSS; row < job.rows; row += LANES / ACROSS) {
      sum += square(row, column);
    }
  }
  partial[lane] = sum;
  reduce(lane, ACROSS);
  if (lane < ACROSS && column < job.columns) {
    put(column, partial[lane]);
  }
}
