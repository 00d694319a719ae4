/** Values of inputs that lie between or over components of the graph: cores, and coefficients of factors. */
import type { CoreTarget } from "../core/session-runtime.ts";
import type { CoreBlock, TaskInput } from "../onnx/adapted.ts";

/** The value of one input for one task, without the leading dimension `tasks`. */
export interface InputValue {
  readonly dims: readonly number[];
  readonly data: Float32Array | BigInt64Array;
}

/** The value of an input for cores while it is filled: each core of a module has its place. */
export class CoreSpace {
  readonly name: string;
  /** Targets in the order of the blocks, with names of modules. */
  readonly targets: readonly (readonly [module: string, target: CoreTarget])[];
  readonly #dims: readonly [height: number, width: number];
  readonly #data: Float32Array;
  readonly #blocks: readonly CoreBlock[];

  /** @param old a value of the same input that may be written over: what lies beside its cores is 0 */
  constructor({ name, dims, cores = [] }: TaskInput, old?: InputValue) {
    const [, height, width] = dims as [string, number, number];
    this.name = name;
    this.#dims = [height, width];
    this.#blocks = cores;
    const data = old?.data as Float32Array | undefined;
    this.#data = data?.length === height * width ? data : new Float32Array(height * width);
    this.targets = cores.map(({ module, row, column }) => {
      return [module, { out: this.#data, at: row * width + column, stride: width }];
    });
  }

  /** The value once cores are written. @param isWritten whether a module's is: the others become zeros */
  value(isWritten: (module: string) => boolean): InputValue {
    const data = this.#data;
    for (const [i, { module, KA, KB, scalesA, scalesB }] of this.#blocks.entries()) {
      const { at, stride } = this.targets[i]![1];
      const written = isWritten(module);
      if (written && !scalesA && !scalesB) continue;
      const across = written && (scalesB ?? new Float32Array(KB).fill(1));
      for (let a = 0, from = at; a < KA; a++, from += stride) {
        const scale = scalesA?.[a] ?? 1;
        if (!across) data.fill(0, from, from + KB);
        else for (let b = 0; b < KB; b++) data[from + b]! *= scale * across[b]!;
      }
    }
    return { dims: this.#dims, data };
  }
}

/** Multiplies coefficients with the scales of their components, in place. @param every how many numbers in a row have one scale @param count of scales, which then begin again */
export function scaled(
  value: InputValue & { readonly data: Float32Array },
  scales: Float32Array | undefined,
  every: number,
  count: number,
): InputValue {
  const { data } = value;
  for (let i = 0; scales && i < data.length; i++) data[i]! *= scales[Math.floor(i / every) % count]!;
  return value;
}
