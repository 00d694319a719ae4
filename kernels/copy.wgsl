// Copies bytes where copyBufferToBuffer cannot: offsets or lengths that are no multiple of 4.
// out[out + i] = source[source + i] for i < length, in bytes; the other bytes of out keep their values.
//
// An invocation makes one word of out from the two words of source that it straddles.

const LANES = 64u;

struct Job {
  // First byte in each binding, and their number.
  out: u32,
  source: u32,
  length: u32,
}

@group(0) @binding(0) var<uniform> job: Job;
@group(0) @binding(1) var<storage, read_write> out: array<u32>;
@group(0) @binding(2) var<storage, read> source: array<u32>;

fn word(index: i32) -> u32 {
  if (index < 0 || u32(index) >= arrayLength(&source)) {
    return 0u;
  }
  return source[index];
}

@compute @workgroup_size(64)
fn copy(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let index = job.out / 4u + (group.y * groups.x + group.x) * LANES + lane;
  let end = job.out + job.length;
  if (4u * index >= end) {
    return;
  }
  // Which of the word's four bytes are copied.
  let first = max(job.out, 4u * index) - 4u * index;
  let last = min(end - 4u * index, 4u);
  let mask = (0xffffffffu << (8u * first)) & (0xffffffffu >> (32u - 8u * last));
  let place = i32(4u * index + job.source) - i32(job.out);
  let shift = u32(place & 3) * 8u;
  var bytes = word(place >> 2u) >> shift;
  if (shift > 0u) {
    bytes |= word((place >> 2u) + 1) << (32u - shift);
  }
  out[index] = (out[index] & ~mask) | (bytes & mask);
}
