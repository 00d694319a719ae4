/** Packs, caches of their bytes, and packs that an isolate keeps. */
import type { Pack } from "eigenlora";
import { taskAdapter } from "eigenlora/build";
import { type CachedSource, type CacheOptions, cachedSource } from "eigenlora/cache";
import { keptPack, type R2Bucket } from "eigenlora/workerd";
import { aborted, type Calls, closed, digits, type Kind, late, must, refusalOf, without } from "./harness.ts";
import { BLOB, BYTES, checkCounts, file, packOf, slowStore } from "./material.ts";

/** Contents of a pack; with a limit, only the task read last has room among those that were not added. */
async function lookAtPack(pack: Pack): Promise<unknown> {
  const found: unknown[] = [pack.residentBytes.basis, [...pack.tasks.keys()]];
  for (const id of pack.tasks.keys()) {
    await checkCounts(pack);
    found.push(await pack.load(id).then(({ bytes }) => digits(bytes), refusalOf));
  }
  for (const { resident } of pack.tasks.values()) found.push(resident);
  found.push(await pack.bases().then(({ bytes, close }) => (close(), digits(bytes)), refusalOf));
  return [...found, pack.residentBytes.basis];
}

const load = (pack: Pack, id: string, signal?: AbortSignal): Promise<string> =>
  pack.load(id, { signal }).then(({ bytes }) => digits(bytes));
export const packCalls: Calls<Pack> = {
  "load a": (pack) => load(pack, "a"),
  "load b": (pack) => load(pack, "b"),
  "load a, broken off": aborted((pack, signal) => load(pack, "a", signal)),
  "prefetch a and b": (pack) => pack.prefetch(["a", "b"]),
  "prefetch a and what is not there": (pack) => pack.prefetch(["a", "x"]),
  "stored a": (pack) => pack.stored("a").then(digits),
  bases: (pack) => pack.bases().then(({ bytes, close }) => late().then(() => (close(), digits(bytes)))),
  "bases, broken off": aborted((pack, signal) => pack.bases({ signal }).then(({ close }) => close())),
  integrity: (pack) => pack.integrity(),
  "addTask c": (pack) => pack.addTask("c", file("c")),
  "addTask c as d": (pack) => pack.addTask("c", file("d")),
  "addTask a": (pack) => pack.addTask("a", file("c")),
  "removeTask a": (pack) => pack.removeTask("a"),
  "removeTask c": (pack) => pack.removeTask("c"),
  replace: async function* (pack) {
    yield pack.removeTask("a");
    yield pack.addTask("a", file("c"));
  },
  "a task as an adapter": async (pack) => {
    const { modules, metadata, close } = await taskAdapter(pack, "a");
    const { Bt } = await [...modules.values()][0]!.read();
    await close();
    return [digits(Bt), JSON.stringify(metadata).length];
  },
  tasks: (pack) => [...pack.tasks.keys()],
  close: (pack) => closed(pack.close(), [() => pack.stored("b")]),
};

/** Two reads, with the pack closed in between. */
const CLOSED = /^\[\["source"\],\[null\]/;
const packs: Kind<Pack>[] = [
  { name: "a pack", open: packOf, calls: packCalls, look: lookAtPack, refused: CLOSED },
  {
    name: "a pack with room for one task",
    open: () => packOf({ maxResidentBytes: BLOB + 1, bases: "later" }),
    // Calls that read both are left out: which of them stays is a question of timing.
    calls: without(
      packCalls,
      "prefetch a and b",
      "a task as an adapter",
      "stored a",
      "addTask c as d",
      "removeTask c",
      "tasks",
      "integrity",
    ),
    look: lookAtPack,
    refused: CLOSED,
  },
];

interface Cache {
  readonly entries: Map<string, Uint8Array>;
  readonly source: CachedSource;
  readonly other: CachedSource;
  /** Requests of the first runtime. */
  readonly asked: { requests: number };
}
const ROOM = 700;

const server =
  (asked: Cache["asked"]) =>
  async (_url: string, { headers }: RequestInit) => {
    asked.requests++;
    await late();
    const [, from, to] = /bytes=(\d+)-(\d+)/.exec(new Headers(headers).get("range") ?? "")!;
    const content = BYTES.slice(Number(from), Number(to) + 1);
    const range = { "content-range": `bytes ${from}-${to}/${BYTES.length}`, etag: '"1"' };
    return new Response(content, { status: 206, headers: range });
  };

const read = (source: CachedSource, ...range: Parameters<CachedSource["read"]>): Promise<string> =>
  source.read(...range).then(digits);
const cacheCalls: Calls<Cache> = {
  read: ({ source }) => read(source, 0, 200),
  "read a part": ({ source }) => read(source, 50, 20),
  "read more": ({ source }) => read(source, 100, 300),
  "read, broken off": aborted(({ source }, signal) => read(source, 0, 200, { signal })),
  "read elsewhere": ({ other }) => read(other, 0, 200),
  identify: ({ source }) => source.identify!(),
  clear: ({ source }) => source.clear(),
  close: ({ source }) => closed(source.close(), [() => read(source, 0, 200)]),
};

const INTEGRITY = `sha256-${"A".repeat(43)}=`;
const caches = [
  { name: "a cache, of a version", warm: false },
  { name: "a cache, of a hash", integrity: INTEGRITY, warm: false },
  { name: "a cache that has been read", warm: true },
].map(({ name, warm, ...how }): Kind<Cache> => {
  const cached = (entries: Cache["entries"], asked: Cache["asked"], more: CacheOptions = {}): CachedSource =>
    cachedSource("https://example.org/a.eigen", slowStore(entries), { ...how, fetch: server(asked), ...more });
  return {
    name,
    calls: cacheCalls,
    async open() {
      const [entries, asked]: [Cache["entries"], Cache["asked"]] = [new Map(), { requests: 0 }];
      const source = cached(entries, asked, { maxBytes: ROOM });
      if (warm) await source.read(600, 10);
      return { entries, source, asked, other: cached(entries, { requests: 0 }) };
    },
    async look({ entries, source, other, asked }) {
      must(source.reads.requests === asked.requests, `${source.reads.requests} requests, not ${asked.requests}`);
      const after = await read(source, 20, 50).catch(refusalOf);
      // Fills whatever room is left, independent of what was kept.
      for (const at of after === "source" ? [] : [400, 700, 1000, 1300]) await source.read(at, 200);
      let held = 0;
      for (const [key, { length }] of entries) held += key === "order" ? 0 : length;
      must(held <= ROOM || other.counts.misses > 0, `the store holds ${held} bytes, it may ${ROOM}`);
      const fresh = cached(entries, { requests: 0 });
      const found = await read(fresh, 0, 200);
      await fresh.clear();
      return [after, found, [...entries.keys()]];
    },
  };
});

interface Bucket {
  readonly bucket: R2Bucket;
  readonly packs: Set<Pack>;
}
const kept: Kind<Bucket> = {
  name: "packs that an isolate keeps",
  async open() {
    const body = { size: BYTES.length, etag: "1", arrayBuffer: async () => BYTES.slice().buffer };
    const found = (key: string) => late().then(() => (key === "a" ? body : null));
    return { bucket: { get: found, head: found } as R2Bucket, packs: new Set() };
  },
  calls: {
    keep: async ({ bucket, packs }) => void packs.add(await keptPack(bucket, "a")),
    "keep what is not there": ({ bucket }) => keptPack(bucket, "b"),
    "keep and load": async ({ bucket, packs }) => {
      const pack = await keptPack(bucket, "a");
      packs.add(pack);
      return load(pack, "a");
    },
  },
  look: async ({ bucket, packs }) => packs.add(await keptPack(bucket, "a")).size,
};

export const STORES: readonly Kind<any>[] = [...packs, ...caches, kept];
