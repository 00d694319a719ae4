/**
 * Calls in pairs: every public call of an object begins while another one is at work, in every order and in several interleavings.
 * Both settle; what they give, and all that can be seen afterwards, is what some order of the two gives, one after the other; or
 * one is refused because the other is at work. Nothing is left behind, and no rejection goes unheard. The soak tries ten times as many.
 */
import t from "tap";
import { pairs } from "./pairs/harness.ts";
import { RUNTIMES } from "./pairs/runtimes.ts";
import { SESSIONS } from "./pairs/sessions.ts";
import { STORES } from "./pairs/stores.ts";
import { TRAINING } from "./pairs/training.ts";

for (const kind of [...STORES, ...RUNTIMES, ...SESSIONS, ...TRAINING])
  t.test(kind.name, { skip: kind.skip ?? false }, (t) => pairs(t, kind));
