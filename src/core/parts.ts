/** What a runtime is made of. */
import type { WeightHost } from "./host.ts";
import type { Locator } from "./locate.ts";
import type { Pack } from "./pack.ts";
import type { PackView } from "./part.ts";
import type { Slot } from "./slots.ts";
import type { Terms } from "./terms.ts";
import type { Workbench } from "./workbench.ts";

/** What lives and dies with a backend. */
export interface Started {
  readonly bench: Workbench;
  readonly passedOver: readonly string[];
  /** Parameters beside the adapted weights are read and written here. */
  readonly host: WeightHost | undefined;
}

/** What stays. */
export interface RuntimeParts {
  readonly pack: Pack;
  /** What is used of it. */
  readonly view: PackView;
  readonly mode: "folded" | "factors" | "core";
  readonly policy: "copy" | "reload";
  readonly slots: readonly Slot[];
  readonly locator: Locator;
  readonly ignored: ReadonlySet<string>;
  /** Where it does not fold. */
  readonly terms: Terms | undefined;
  readonly closeHost: (() => Promise<void>) | undefined;
  /** Another backend in place of one whose device was lost. */
  readonly restart: (() => Promise<Started>) | undefined;
}
