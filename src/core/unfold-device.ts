/** Terms from a device, on which factors and scales are made and from which they are read. Loaded where one is at work. */
import type { Slice } from "../backends/backend.ts";
import { hasCore } from "./core.ts";
import type { Factors } from "./unfold.ts";
import type { Workbench } from "./workbench.ts";

/** The factors that are not in a core, by module: one read a round. */
export async function fetchFactors(bench: Workbench, mode: "core" | "factors"): Promise<Map<number, Factors>> {
  const factors = new Map<number, Factors>();
  for (const round of bench.rounds) {
    const wanted = round.filter((plan) => plan.rank > 0 && !hasCore(plan, mode));
    if (wanted.length === 0) continue;
    const places = wanted.map((plan) => bench.expand(plan));
    const { block } = places[0]!.A;
    const all = await fetchFloats(bench, { block, byteOffset: 0 }, Math.floor(block.byteLength / 4));
    for (const [i, { module, rank }] of wanted.entries()) {
      const part = ({ byteOffset }: Slice, width: number): Float32Array =>
        all.subarray(byteOffset / 4, byteOffset / 4 + rank * width);
      const { in: inputs, out } = bench.modules[module]!;
      factors.set(module, { A: part(places[i]!.A, inputs), Bt: part(places[i]!.Bt, out) });
    }
  }
  return factors;
}

/** `count` f32 values, once everything recorded before has taken effect. */
export async function fetchFloats({ backend }: Workbench, slice: Slice, count: number): Promise<Float32Array> {
  const { buffer, byteOffset } = await backend.read!(slice, 4 * count);
  return new Float32Array(buffer, byteOffset, count);
}
