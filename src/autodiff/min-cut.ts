/**
 * Finds the cheapest set of nodes that every path from a source to a sink passes (Dinic's algorithm): the values of a forward run to keep
 * so that everything needed later can be computed from them.
 */

/** A node: its cost, and the nodes that lead to it. */
export interface NetworkNode<P> {
  /** Infinity: never chosen. */
  readonly cost: number;
  /** Whether paths begin here. */
  readonly source: boolean;
  readonly sink: boolean;
  readonly before: readonly P[];
}

interface Edge {
  readonly to: number;
  left: number;
  readonly back: number;
}

/** The flow network. Each node becomes two, joined by an edge with the cost as capacity. */
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

  /** Sends as much flow as possible. */
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

  /** Adds one path. A loop rather than recursion: models are thousands of nodes deep. */
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

  /** Nodes that still reach the sink. */
  behind(sink: number): ReadonlySet<number> {
    const found = new Set([sink]);
    for (const at of found) {
      for (const { to, back } of this.#edges[at]!) if (this.#edges[to]![back]!.left > 0) found.add(to);
    }
    return found;
  }
}

/**
 * @param places no path may consist of nodes with cost Infinity only
 * @returns the cheapest set; among equally cheap ones the nearest to the sinks
 */
export function minCut<P>(places: ReadonlyMap<P, NetworkNode<P>>): ReadonlySet<P> {
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
