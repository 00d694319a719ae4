/**
 * Gradients held against the loss itself, before the first step: some providers compute wrong numbers without a word.
 */
import { BackendError, type EigenLoraError } from "../errors.ts";
import { normal, uniform } from "../tensor/random.ts";
import type { Evaluated } from "./objective.ts";
import { copyOf, type State } from "./state.ts";

/** Training that cannot go on. */
export function stopped(message: string): EigenLoraError {
  return new BackendError(`fit: ${message}`, { backend: "train" });
}

/**
 * Compares slopes in two directions, that of the gradient and one beside it.
 * @throws BackendError when they are not what the gradient says, or nothing is a number
 */
export async function checkGradients(
  state: State,
  evaluate: (state: State) => Promise<Pick<Evaluated, "loss" | "gradients">>,
): Promise<void> {
  const { loss, gradients } = await evaluate(state);
  const gradient = gradients.all;
  const norm = Math.sqrt(gradient.reduce((sum, g) => sum + g * g, 0));
  if (norm === 0 && Number.isFinite(loss)) return;
  if (!(norm > 0)) {
    throw stopped(
      `the loss is ${loss} and its gradient ${norm} before the first step: the model or the examples give no numbers`,
    );
  }
  const noise = uniform(7);
  const along = gradient.map((g) => g / norm);
  const beside = along.map((d) => d + (0.5 * normal(noise)) / Math.sqrt(along.length));
  // So far that the loss moves well above the noise of f32, and hardly bends.
  const step = Math.min(0.05, 0.01 / norm);
  for (const direction of [along, beside]) {
    const lossAt = async (by: number): Promise<number> => {
      const moved = copyOf(state);
      direction.forEach((d, i) => (moved.all[i]! += by * d));
      return (await evaluate(moved)).loss;
    };
    const slope = gradient.reduce((sum, g, i) => sum + g * direction[i]!, 0);
    const [up, down] = [((await lossAt(step)) - loss) / step, (loss - (await lossAt(-step))) / step];
    const found = (up + down) / 2;
    // Where nothing is left to learn the gradient is all but zero, and the bend is what is seen.
    const bend = Math.abs(up - down) / 2;
    if (Math.abs(found - slope) <= 0.1 * Math.abs(slope) + bend + (1e-6 * (1 + loss)) / step) continue;
    throw stopped(
      `the loss changes by ${found.toPrecision(3)} where its gradient says ${slope.toPrecision(3)}: this provider computes gradients wrongly. Use another`,
    );
  }
}
