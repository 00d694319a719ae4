/**
 * The cheapest set of places in a network that every path from a source to a sink goes through: what to keep of a forward run, so
 * that all that is wanted later can be made of it. By Dinic's algorithm.
 */

/** A place: how much it costs, and which places lead to it. */
export interface Place<P> {
  /** Infinity: never chosen. */
  readonly cost: number;
  /** Where paths begin. */
  readonly source: boolean;
  readonly sink: boolean;
  readonly before: readonly P[];
}

interface Edge {
  readonly to: number;
  left: number;
  readonly back: number;
}

/** Each place is two, with an edge between them that costs what the place does. */
class Network {
  readonly #edges: Edge[][];
  #level: number[] = [];
  #next: number[] = [];

  constructor(size: number) {
    this.#edges = Array.from({ length: size }, () => []);
  }

  connect(from: number, to: number, capacity: number): void {
    const [there, back] = [this.#edges[from]!, this.#edges[to]!];
    there.push({ to, left: capacity, back: back.length });
    back.push({ to: from, left: 0, back: there.length - 1 });
  }

  /** Fills the network. */
  fill(source: number, sink: number): void {
    while (this.#measure(source, sink)) {
      this.#next = this.#edges.map(() => 0);
      while (this.#augment(source, sink) > 0);
    }
  }

  #measure(source: number, sink: number): boolean {
    this.#level = this.#edges.map(() => -1);
    this.#level[source] = 0;
    const queue = [source];
    for (const at of queue) {
      for (const { to, left } of this.#edges[at]!) {
        if (left <= 0 || this.#level[to]! >= 0) continue;
        this.#level[to] = this.#level[at]! + 1;
        queue.push(to);
      }
    }
    return this.#level[sink]! >= 0;
  }

  /** One more path. A loop rather than recursion: models are thousands of nodes deep. */
  #augment(source: number, sink: number): number {
    const path: Edge[] = [];
    let at = source;
    while (at !== sink) {
      const edge = this.#edges[at]![this.#next[at]!];
      if (edge && edge.left > 0 && this.#level[edge.to] === this.#level[at]! + 1) {
        path.push(edge);
        at = edge.to;
      } else if (edge) {
        this.#next[at]!++;
      } else {
        if (path.length === 0) return 0;
        const last = path.pop()!;
        at = this.#edges[last.to]![last.back]!.to;
        this.#next[at]!++;
      }
    }
    const most = path.reduce((least, { left }) => Math.min(least, left), Infinity);
    for (const edge of path) {
      edge.left -= most;
      this.#edges[edge.to]![edge.back]!.left += most;
    }
    return most;
  }

  /** From where the sink can still be reached. */
  behind(sink: number): ReadonlySet<number> {
    const found = new Set([sink]);
    for (const at of found) {
      for (const { to, back } of this.#edges[at]!) if (this.#edges[to]![back]!.left > 0) found.add(to);
    }
    return found;
  }
}

/**
 * @param places none that costs Infinity lies between a source and a sink alone
 * @returns of the sets that cost the least the one nearest to the sinks
 */
export function minCut<P>(places: ReadonlyMap<P, Place<P>>): ReadonlySet<P> {
  const number = new Map([...places.keys()].map((place, i) => [place, 2 * i]));
  const [source, sink] = [2 * places.size, 2 * places.size + 1];
  const network = new Network(sink + 1);
  for (const [place, one] of places) {
    const at = number.get(place)!;
    network.connect(at, at + 1, one.cost);
    if (one.source) network.connect(source, at, Infinity);
    if (one.sink) network.connect(at + 1, sink, Infinity);
    for (const before of one.before) {
      const from = number.get(before);
      if (from !== undefined) network.connect(from + 1, at, Infinity);
    }
  }
  network.fill(source, sink);
  const behind = network.behind(sink);
  return new Set([...number].flatMap(([place, at]) => (!behind.has(at) && behind.has(at + 1) ? [place] : [])));
}
