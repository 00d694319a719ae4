/**
 * Replaces methods of an object by ones that wait first. Knows neither what they wait for nor the object's class.
 */

/** An object whose methods are held. */
export interface Held<Target extends object> {
  /**
   * The same object with its methods as they were. Held methods have it as `this`: a call's inner calls were let through with it,
   * and would wait for themselves otherwise.
   */
  readonly inside: Target;
  /** Puts the methods back. */
  free(): void;
}

type Method = (this: unknown, ...args: unknown[]) => unknown;
type Members = Record<PropertyKey, unknown>;

/**
 * Replaces methods in place, so that all code that has the object has the held methods.
 * @param methods names; unknown ones are passed over. A function that is called itself goes through its method `_call`, as callable
 *   objects of transformers.js do
 * @param enter calls what it is given, now or later
 * @param others what `inside` has in place of some of the object's other properties
 */
export function hold<Target extends object>(
  target: Target,
  methods: readonly string[],
  enter: <Result>(work: () => Promise<Result>) => Promise<Result>,
  others: Readonly<Members> = {},
): Held<Target> {
  const members = target as Members;
  const originals = new Map<PropertyKey, unknown>(Object.entries(others));
  const inside = new Proxy(target, {
    get: (object, key, receiver) => (originals.has(key) ? originals.get(key) : Reflect.get(object, key, receiver)),
    apply: (_target, _this, args: unknown[]) => (originals.get("_call") as Method).apply(inside, args),
  });
  const undo = methods.map((name) => {
    const original = members[name];
    if (typeof original !== "function") return () => undefined;
    originals.set(name, original);
    const own = Object.getOwnPropertyDescriptor(target, name) !== undefined;
    const held = (...args: unknown[]): Promise<unknown> => enter(async () => (original as Method).apply(inside, args));
    members[name] = held;
    return () => {
      // Another wrapper may lie around ours.
      if (members[name] !== held) return;
      if (own) members[name] = original;
      else delete members[name];
    };
  });
  return { inside, free: () => undo.forEach((put) => put()) };
}
