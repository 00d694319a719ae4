/**
 * Events of packs and sessions, in the platform's own way: each is an `EventTarget` with typed listeners. Until
 * somebody listens an event costs nothing.
 */

/** An event, as listeners get it: a `CustomEvent`. */
export interface DetailedEvent<Detail> {
  readonly type: string;
  readonly detail: Detail;
}

/** A listener: a function, or an object with a method of this name. */
export type Listener<Detail> =
  | ((event: DetailedEvent<Detail>) => void)
  | { handleEvent(event: DetailedEvent<Detail>): void };

/** Options of `addEventListener`. */
export interface ListenOptions {
  readonly once?: boolean | undefined;
  /** Ends listening when it is aborted. */
  readonly signal?: AbortSignal | undefined;
  readonly capture?: boolean | undefined;
  readonly passive?: boolean | undefined;
}

/** Adds or removes a listener. */
export type Listen<Events extends object> = <Type extends keyof Events & string>(
  type: Type,
  listener: Listener<Events[Type]> | null,
  options?: boolean | ListenOptions,
) => void;

/** An object with events: an `EventTarget`, where the engine has those. `Events` names the detail of each. */
export interface Observable<Events extends object> {
  readonly addEventListener: Listen<Events>;
  readonly removeEventListener: Listen<Events>;
  /** @internal Called when the first listener of a type is added. */
  heard(type: string): void;
  /** @internal */
  tell<Type extends keyof Events & string>(type: Type, detail: Events[Type]): void;
}

// Bare engines have no EventTarget, so no listener can be added.
class Platform extends (globalThis.EventTarget ?? (Object as never)) {
  readonly #heard = new Set<string>();

  override addEventListener(...listener: Parameters<EventTarget["addEventListener"]>): void {
    super.addEventListener(...listener);
    const [type] = listener;
    if (this.#heard.has(type)) return;
    this.#heard.add(type);
    this.heard(type);
  }

  heard(_type: string): void {}

  tell(type: string, detail: unknown): void {
    if (this.#heard.has(type)) this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

/** Base of what has events. */
export const Observable: new <Events extends object>() => Observable<Events> = Platform as never;
