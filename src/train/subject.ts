/**
 * What a trainer trains: a model that runs with a task's numbers, and the pack that gives them a meaning. Shapes only.
 */
import type { Pack } from "../core/pack.ts";
import type { Term } from "../tensor/term.ts";
import type { HeadLayer } from "./head.ts";
import type { Lessons, Targets } from "./lessons.ts";
import type { Terms } from "./terms.ts";

/** A task as a model is fed with it: terms by module name, weights and biases of the head's layers as in a `State`. */
export interface Point {
  readonly terms: ReadonlyMap<string, Term>;
  readonly weight: Float32Array<ArrayBuffer>;
  readonly bias: Float32Array<ArrayBuffer>;
}

/** One run that learns. */
export interface MachineStep {
  readonly loss: number;
  /** As the point. */
  readonly gradients: Point;
}

/** A model that can be trained. `Feeds` are one batch of its inputs. */
export interface Machine<Feeds> {
  /** The layers that are trained whole, the one with the labels last; empty where the model's own outputs are the logits. */
  readonly head: readonly HeadLayer[];
  /** Logits [rows, classes] alone: a row for each text, or for each position that the batch asks for. */
  answer(batch: Feeds, point: Point): Promise<Float32Array>;
  step(batch: Feeds, point: Point, targets: Targets): Promise<MachineStep>;
}

export interface Subject<Feeds> {
  readonly pack: Pack;
  readonly machine: Machine<Feeds>;
  readonly lessons: Lessons<Feeds>;
  readonly terms: Terms;
  /** Terms over the pack's components that a LoRA can begin from; the same terms where coefficients are trained. */
  readonly origin: Terms;
  /** Empty for language models. */
  readonly labels: readonly string[];
}
