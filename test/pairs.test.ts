/**
 * Calls in pairs: every public call of an object begins while another is running, in every order and in several interleavings. Both
 * settle. Their results, and all that can be seen afterwards, equal those of the calls one after the other in some order; or one is
 * refused because the other is running. Nothing is left behind, and no rejection is unhandled. The soak tries ten times as many.
 */
import t from "tap";
import { pairs } from "./pairs/harness.ts";
import { RUNTIMES } from "./pairs/runtimes.ts";
import { SESSIONS } from "./pairs/sessions.ts";
import { STORES } from "./pairs/stores.ts";
import { TRAINING } from "./pairs/training.ts";

for (const kind of [...STORES, ...RUNTIMES, ...SESSIONS, ...TRAINING])
  t.test(kind.name, { skip: kind.skip ?? false }, (t) => pairs(t, kind));
