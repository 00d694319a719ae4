/**
 * Rotary position embeddings: pairs of elements of a head are rotated by an angle that depends on the position.
 */
import { INT64 } from "../../onnx/linear.ts";
import type { Emitter } from "../emit.ts";
import type { Define, Fused } from "./fused.ts";

interface Rotary {
  /** Cosines and sines, broadcast to [batch, positions, heads, turned / 2]. */
  readonly cos: string;
  readonly sin: string;
  /** Number of elements of a head that are rotated; the others behind them stay. */
  readonly turned: number;
  /** Whether some elements stay. */
  readonly rest: boolean;
}

/**
 * Looks up the angles of positions.
 * @param places int64 [positions] or [batch, positions]
 * @param width of a head, where it is known; all of it is rotated where it is not
 * @returns the reason where it cannot be done
 */
export function rotaryOf(
  node: Fused,
  cosCache: string,
  sinCache: string,
  places: string,
  width: number | undefined,
  turned: number | undefined = node.weight(cosCache)?.at(-1),
): Rotary | string {
  const { emit } = node;
  if (turned === undefined) return "has tables of positions that are no weights";
  const at = (table: string): string => emit.unsqueeze(emit.op("Gather", [table, places], { axis: 0 }), [-2]);
  return {
    cos: at(cosCache),
    sin: at(sinCache),
    turned: 2 * turned,
    rest: width !== undefined && width > 2 * turned,
  };
}

/** @param x [batch, positions, heads, width] */
export function rotated(
  emit: Emitter,
  x: string,
  { cos, sin, turned, rest, interleaved }: Rotary & { interleaved: boolean },
): string {
  const front = rest ? emit.slice(x, 3, 0, turned) : x;
  const behind = rest ? [emit.slice(x, 3, turned, 2 ** 31)] : [];
  const turn = (a: string, b: string): readonly [string, string] => [
    emit.sub(emit.mul(a, cos), emit.mul(b, sin)),
    emit.add(emit.mul(b, cos), emit.mul(a, sin)),
  ];
  if (!interleaved) {
    const [a, b] = emit.split(front, 3, [turned / 2, turned / 2]) as [string, string];
    return emit.concat([...turn(a, b), ...behind], 3);
  }
  const pairs = emit.op("Reshape", [front, emit.ints([0, 0, 0, turned / 2, 2])]);
  const [a, b] = emit.split(pairs, 4, [1, 1]).map((one) => emit.op("Squeeze", [one, emit.ints([4])]));
  const mixed = emit.concat(
    turn(a!, b!).map((one) => emit.unsqueeze(one, [4])),
    4,
  );
  return emit.concat([emit.op("Reshape", [mixed, emit.ints([0, 0, 0, turned])]), ...behind], 3);
}

/** @param inputs indices of the tables and the positions */
function embedding(inputs: { readonly cos: number; readonly sin: number; readonly places: number }): Define {
  return (node) => {
    const { emit } = node;
    if (!node.has(inputs.places)) return "has no positions, but a row of its tables for each token: that is not known";
    if (node.float("scale", 1) !== 1) return "scales what it turns, which is not known";
    const rank = node.rank(node.x(0), 3);
    const places = node.x(inputs.places);
    if (node.rank(places, 2) !== 2) return "has positions other than [batch, positions], which is not known";
    const part = node.int("rotary_embedding_dim");
    const half = part > 0 ? part / 2 : node.weight(node.x(inputs.cos))?.at(-1);
    const all = node.width(node.x(0)) ?? NaN;
    const heads = node.int("num_heads");
    const width = part > 0 && rank === 3 ? all / heads : undefined;
    if (part > 0 && (rank !== 3 || !Number.isInteger(width))) return "does not tell how wide a head is";
    const rotary = rotaryOf(
      node,
      node.x(inputs.cos),
      node.x(inputs.sin),
      emit.op("Cast", [places], { to: INT64 }),
      width,
      half,
    );
    if (typeof rotary === "string") return rotary;
    const interleaved = node.int("interleaved") !== 0;
    if (rank === 4) {
      const perm = { perm: [0, 2, 1, 3] };
      const turned = rotated(emit, emit.op("Transpose", [node.x(0)], perm), { ...rotary, interleaved });
      node.give(0, emit.op("Transpose", [turned], perm));
    } else {
      const split = heads > 0 ? [0, 0, heads, -1] : [0, 0, -1, rotary.turned];
      const apart = emit.op("Reshape", [node.x(0), emit.ints(split)]);
      node.give(0, emit.op("Reshape", [rotated(emit, apart, { ...rotary, interleaved }), emit.ints([0, 0, -1])]));
    }
    return undefined;
  };
}

export const ROTARIES: readonly (readonly [string, Define])[] = [
  ["com.microsoft.RotaryEmbedding", embedding({ places: 1, cos: 2, sin: 3 })],
  ["RotaryEmbedding", embedding({ cos: 1, sin: 2, places: 3 })],
];
