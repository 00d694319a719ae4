// Weights of a task: out[i, j] = (base[i, j] + Σ_k left[k, i] · right[k, j]) · row_scale[i] · column_scale[j], computed
// in f32 and rounded once, to nearest even.
//
//   base, out     [rows, columns] of f32, f16 or bf16, rows `stride` elements apart, from any element of their binding
//   left, right   f32 [rank, rows] and [rank, columns]
//   scales        f32 [rows] and [columns]; each may be absent
//
// A workgroup makes a tile of HEIGHT rows by LANES words of out. An invocation makes one word of every row, so that an
// element of right, once in a register, serves HEIGHT rows; neighbours read neighbouring elements, and all read the
// same of left. Base is read once and out written once. Halves lie two to a word, so that no device feature is needed;
// a word is written by one invocation only, and halves in it that are not the weight's keep their bits. Where two rows
// meet in a word, it belongs to the upper row.

// 0 f32, 1 f16, 2 bf16.
override FORMAT: u32 = 0;
// Elements of a word.
override PER_WORD: u32 = select(2u, 1u, FORMAT == 0u);

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
@group(0) @binding(1) var<storage, read_write> out: array<u32>;
@group(0) @binding(2) var<storage, read> left: array<f32>;
@group(0) @binding(3) var<storage, read> right: array<f32>;
@group(0) @binding(4) var<storage, read> row_scale: array<f32>;
@group(0) @binding(5) var<storage, read> column_scale: array<f32>;
@group(0) @binding(6) var<storage, read> base: array<u32>;

// Σ_k of the tile's rows, for the columns of this invocation's word.
var<private> sums: array<vec2f, HEIGHT>;

struct Tile {
  row: u32,
  // Column of the word, counted in words of a row.
  word: u32,
}

// A word of out, seen from the row that owns it.
struct OutWord {
  // True if this invocation writes the word.
  mine: bool,
  word: u32,
  row: u32,
  // Column of the word's first element; −1 where that lies before the row.
  column: i32,
}

// pack2x16float may round either way.
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

fn bf16_bits(value: f32) -> u32 {
  let pattern = bitcast<u32>(value);
  if ((pattern & 0x7fffffffu) > 0x7f800000u) {
    return (pattern >> 16u) | 0x40u;
  }
  return (pattern + 0x7fffu + ((pattern >> 16u) & 1u)) >> 16u;
}

fn encoded(value: f32) -> u32 {
  if (FORMAT == 0u) {
    return bitcast<u32>(value);
  }
  if (FORMAT == 1u) {
    return f16_bits(value);
  }
  return bf16_bits(value);
}

fn tile_of(group: vec3u, groups: vec3u) -> Tile {
  let across = (job.columns + PER_WORD - 1u + LANES * PER_WORD - 1u) / (LANES * PER_WORD);
  let index = group.y * groups.x + group.x;
  return Tile(job.first + (index / across) * HEIGHT, (index % across) * LANES);
}

// Fills `sums`.
fn accumulate(tile: Tile, lane: u32) {
  // Columns of a row that begins with a word; a row that begins with a word's second half is one column behind.
  let column = (tile.word + lane) * PER_WORD;
  for (var k = 0u; k < job.rank; k++) {
    let start = job.right + k * job.columns + column;
    var near: vec3f;
    if (PER_WORD == 2u && column > 0u && column <= job.columns) {
      near.x = right[start - 1u];
    }
    if (column < job.columns) {
      near.y = right[start];
    }
    if (PER_WORD == 2u && column + 1u < job.columns) {
      near.z = right[start + 1u];
    }
    for (var i = 0u; i < HEIGHT; i++) {
      let row = min(tile.row + i, job.rows - 1u);
      sums[i] += left[job.left + k * job.rows + row] * select(near.yz, near.xy, skew(row) == 1u);
    }
  }
}

// Position of a row's first element in its word.
fn skew(row: u32) -> u32 {
  return (job.out + (row - job.first) * job.stride) & (PER_WORD - 1u);
}

fn place_of(row: u32, word: u32) -> OutWord {
  let start = job.out + (row - job.first) * job.stride;
  let shift = start & (PER_WORD - 1u);
  let column = i32(word * PER_WORD) - i32(shift);
  let shared_with_upper = column < 0 && row > 0u && job.stride == job.columns;
  let mine = row < job.end && column < i32(job.columns) && !shared_with_upper;
  return OutWord(mine, start / PER_WORD + word, row, column);
}

fn folded(before: u32, sum: f32, row: u32, column: u32) -> u32 {
  if (job.rank == 0u && job.scales == 0u) {
    // Copies the bits, which arithmetic on a NaN may change.
    return before;
  }
  var value = decoded(before) + sum;
  if ((job.scales & ROW_SCALE) != 0u) {
    value *= row_scale[job.row_scale + row];
  }
  if ((job.scales & COLUMN_SCALE) != 0u) {
    value *= column_scale[job.column_scale + column];
  }
  return encoded(value);
}

// The new word, where `before` holds base's bits of the word's elements and `kept` what lies in out.
fn word_at(place: OutWord, sum: vec2f, before: vec2u, kept: u32) -> u32 {
  if (PER_WORD == 1u) {
    return folded(before.x, sum.x, place.row, u32(place.column));
  }
  var low = kept & 0xffffu;
  var high = kept >> 16u;
  if (place.column >= 0) {
    low = folded(before.x, sum.x, place.row, u32(place.column));
  }
  let next = u32(place.column + 1);
  if (next < job.columns) {
    high = folded(before.y, sum.y, place.row, next);
  } else if (next == job.stride && place.row + 1u < job.rows) {
    var first = 0.0;
    for (var k = 0u; k < job.rank; k++) {
      first += left[job.left + k * job.rows + place.row + 1u] * right[job.right + k * job.columns];
    }
    high = folded(before.y, first, place.row + 1u, 0u);
  }
  return low | (high << 16u);
}

fn base_bits(index: u32) -> u32 {
  if (PER_WORD == 1u) {
    return base[index];
  }
  return (base[index >> 1u] >> ((index & 1u) * 16u)) & 0xffffu;
}

@compute @workgroup_size(64)
fn fold(
  @builtin(workgroup_id) group: vec3u,
  @builtin(num_workgroups) groups: vec3u,
  @builtin(local_invocation_index) lane: u32,
) {
  let tile = tile_of(group, groups);
  accumulate(tile, lane);
  for (var i = 0u; i < HEIGHT; i++) {
    let place = place_of(tile.row + i, tile.word + lane);
    if (place.mine) {
      let row_start = job.base + (place.row - job.first) * job.stride;
      var before: vec2u;
      if (place.column >= 0) {
        before.x = base_bits(row_start + u32(place.column));
      }
      if (PER_WORD == 2u) {
        before.y = base_bits(row_start + u32(place.column + 1));
      }
      var kept = 0u;
      if (PER_WORD == 2u && (place.column < 0 || u32(place.column + 1) >= job.columns)) {
        kept = out[place.word];
      }
      out[place.word] = word_at(place, sums[i], before, kept);
    }
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
  accumulate(tile, lane);
  for (var i = 0u; i < HEIGHT; i++) {
    let place = place_of(tile.row + i, tile.word + lane);
    if (place.mine) {
      let kept = out[place.word];
      var before = vec2u(kept, 0u);
      if (PER_WORD == 2u) {
        before = vec2u(kept & 0xffffu, kept >> 16u);
      }
      out[place.word] = word_at(place, sums[i], before, kept);
    }
  }
}
