// Products with components, in both directions; any number of jobs at once, where no job reads what another one writes.
//
//   expand   out[i, j] = Σ_k numbers[i, k] · basis[k, j], or that much more: factors from coefficients. Sums run over k
//            in order
//   project  out[i, k] = Σ_j numbers[i, j] · basis[k, j]: products of vectors and rows
//
//   basis         one encoded tensor [rows, width] of SPEC.md section 5: f16 scales first where the type has them, then
//                 rows
//   numbers, out  f32, `count` rows of them: [count, rows] on the side of k, [count, width] on the side of j
//
// A workgroup of expand makes LANES columns of COUNT rows; an invocation makes one column, so that a component is
// decoded once for all its rows, and neighbours read neighbouring components. A workgroup of project makes one
// component's products with COUNT vectors: its invocations sum every LANES-th product, then a tree adds their sums.
// Tensors begin at any word of their binding.

// Code of the bases' type in the file: 0 f32, 1 f16, 2 bf16, 3 int8, 4 int4, 5 int3.
override FORMAT: u32 = 0;
override BITS: u32 = select(select(3u, 4u, FORMAT == 4u), 8u, FORMAT == 3u);

const LANES = 64u;
const COUNT = 8u;

struct Job {
  // Workgroups of this job and those before it.
  end: u32,
  count: u32,
  rows: u32,
  width: u32,
  // First word of each tensor in its binding.
  out: u32,
  numbers: u32,
  basis: u32,
  // Packed integers: first byte of the rows in the basis' binding, and bytes from one row to the next.
  packed: u32,
  row_bytes: u32,
  // Expand: whether the sums are added to what out holds.
  add: u32,
}

@group(0) @binding(0) var<storage, read> jobs: array<Job>;
@group(0) @binding(1) var<storage, read_write> out: array<f32>;
@group(0) @binding(2) var<storage, read> numbers: array<f32>;
@group(0) @binding(3) var<storage, read> basis: array<u32>;

var<private> job: Job;
var<workgroup> partial: array<f32, LANES>;

fn half_at(index: u32) -> u32 {
  return (basis[index >> 1u] >> ((index & 1u) * 16u)) & 0xffffu;
}

// The integer of BITS bits at `column` of a packed row; it may reach into the next word.
fn integer_at(row: u32, column: u32) -> f32 {
  let bit = column * BITS;
  let byte = job.packed + row * job.row_bytes + (bit >> 3u);
  let shift = (byte & 3u) * 8u + (bit & 7u);
  var pattern = basis[byte >> 2u] >> shift;
  if (shift + BITS > 32u) {
    pattern |= basis[(byte >> 2u) + 1u] << (32u - shift);
  }
  let unused = 32u - BITS;
  return f32(bitcast<i32>(pattern << unused) >> unused);
}

fn component(row: u32, column: u32) -> f32 {
  let index = row * job.width + column;
  if (FORMAT == 0u) {
    return bitcast<f32>(basis[job.basis + index]);
  }
  if (FORMAT <= 2u) {
    return decoded(half_at(2u * job.basis + index));
  }
  return f16_value(half_at(2u * job.basis + row)) * integer_at(row, column);
}

// The first job whose end lies behind the workgroup; as many as there are jobs if none does.
fn job_of(group: u32) -> u32 {
  var low = 0u;
  var high = arrayLength(&jobs);
  while (low < high) {
    let middle = (low + high) / 2u;
    if (jobs[middle].end > group) {
      high = middle;
    } else {
      low = middle + 1u;
    }
  }
  return low;
}

@compute @workgroup_size(64)
fn expand(
  @builtin(workgroup_id) id: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  var group = id.y * groups.x + id.x;
  let index = job_of(group);
  if (index == arrayLength(&jobs)) {
    return;
  }
  job = jobs[index];
  if (index > 0u) {
    group -= jobs[index - 1u].end;
  }
  let across = (job.width + LANES - 1u) / LANES;
  let column = (group % across) * LANES + lane;
  if (column >= job.width) {
    return;
  }
  let first = (group / across) * COUNT;
  let count = min(COUNT, job.count - first);
  var sums: array<f32, COUNT>;
  for (var k = 0u; k < job.rows; k++) {
    let value = component(k, column);
    for (var i = 0u; i < count; i++) {
      sums[i] += numbers[job.numbers + (first + i) * job.rows + k] * value;
    }
  }
  for (var i = 0u; i < count; i++) {
    let at = job.out + (first + i) * job.width + column;
    // Added last, so that a small sum is made at its own magnitude.
    out[at] = select(sums[i], out[at] + sums[i], job.add != 0u);
  }
}

@compute @workgroup_size(64)
fn project(
  @builtin(workgroup_id) id: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  var group = id.y * groups.x + id.x;
  let index = job_of(group);
  // Workgroups behind the last job run the same code: barriers are for all invocations or none.
  job = jobs[min(index, arrayLength(&jobs) - 1u)];
  if (index > 0u) {
    group -= jobs[index - 1u].end;
  }
  let row = group % max(job.rows, 1u);
  let first = (group / max(job.rows, 1u)) * COUNT;
  var count = min(COUNT, max(job.count, first) - first);
  if (index == arrayLength(&jobs)) {
    count = 0u;
  }
  var sums: array<f32, COUNT>;
  if (count > 0u) {
    for (var j = lane; j < job.width; j += LANES) {
      let value = component(row, j);
      for (var i = 0u; i < count; i++) {
        sums[i] += numbers[job.numbers + (first + i) * job.width + j] * value;
      }
    }
  }
  for (var i = 0u; i < COUNT; i++) {
    partial[lane] = sums[i];
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
      workgroupBarrier();
      if (lane < half) {
        partial[lane] += partial[lane + half];
      }
    }
    if (lane == 0u && i < count) {
      out[job.out + (first + i) * job.rows + row] = partial[0];
    }
    workgroupBarrier();
  }
}
