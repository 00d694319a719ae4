/** What is said of a switch that failed where nothing could be put back. Loaded when one does. */
import { BackendError } from "../errors.ts";

/**
 * @param first why it failed
 * @param second why what was there before could not be put back
 * @param backend that runs
 */
export function cannotPutBack(first: unknown, second: unknown, backend: string): BackendError {
  const [why, then] = [first, second].map((error) => (error instanceof Error ? error.message : String(error)));
  const message =
    `${why}; and what was there before could not be put back: ${then}. The weights are a mixture until a switch succeeds: ` +
    "switch again, null writes the base's";
  return new BackendError(message, { backend, cause: new AggregateError([first, second], why) });
}
