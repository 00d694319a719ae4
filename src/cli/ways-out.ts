/** What to do when a pack does not fit into the bytes that were asked for. */
import { Unreachable } from "../pack/seek.ts";
import type { Dtypes } from "../tensor/dtypes.ts";

/** The options of `pack` that decide how small a pack can be. */
interface SizeOptions {
  readonly mode: string;
  readonly ratio: number | undefined;
  readonly dtype: Partial<Dtypes> | undefined;
  readonly rank: number | undefined;
}

/**
 * For `catch` around the making of a pack: adds to an error about too few bytes what else to ask for.
 * @param adapterBytes of all adapters together
 */
export function addWaysOut({ mode, ratio, dtype, rank }: SizeOptions, adapterBytes: number): (error: unknown) => never {
  return (error) => {
    if (!(error instanceof Unreachable) || error.least === undefined) throw error;
    const auto = mode === "auto";
    // Rounded down: this one can be had.
    const most = Math.floor((10 * adapterBytes) / error.least) / 10;
    const what =
      ratio === undefined
        ? error.message
        : `--ratio ${ratio}: a pack of these adapters can be at most ${most.toFixed(1)}× smaller than they are`;
    const ways = [
      ...(auto && dtype ? ["leave out --dtype, so that fewer bits are tried"] : []),
      ...(!auto && !dtype?.basis?.startsWith("int") ? ["--dtype int4"] : []),
      ...(!auto && rank === undefined ? ["--gauge balanced --rank N, which keeps less of each adapter"] : []),
      ...(auto ? [] : ["--mode auto, which tries all ways of packing"]),
      ratio === undefined ? `--bytes ${error.least} or more` : `--ratio ${most} or less`,
    ];
    throw new RangeError(`${what}. Ways out: ${ways.join("; ")}`, { cause: error });
  };
}
