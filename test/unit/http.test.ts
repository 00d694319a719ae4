/**
 * Files behind misbehaving servers, on real sockets: temporary faults are retried, lasting ones are named, versions are
 * never mixed, and requests are counted.
 */
import { readFile } from "node:fs/promises";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import { type AddressInfo, createServer as createTcpServer, type Server, type Socket } from "node:net";
import { gzipSync } from "node:zlib";
import { type OpenOptions, openPack, type Pack, SourceError } from "eigenlora";
import t, { type Test } from "tap";
import { openSource } from "../support/internals/base.ts";
import { readModel } from "../support/internals/models.ts";
import { data, vector } from "../support/packs.ts";

const golden = await readFile(vector("every-kind.eigen"));
const HTML = "<!doctype html><title>Log in</title>";

/** A request's range, as [start, end); undefined without a range. */
interface Asked {
  readonly request: IncomingMessage;
  readonly response: ServerResponse;
  readonly range: readonly [number, number] | undefined;
  /** Requests before this one. */
  readonly before: number;
}
type Behaviour = (asked: Asked) => void;

interface Origin {
  readonly url: string;
  /** Method and range of each request. */
  readonly log: string[];
  /** Replaces the server's behaviour. */
  behave: Behaviour;
}

async function listening(server: Server): Promise<number> {
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return (server.address() as AddressInfo).port;
}

async function origin(t: Test, behave: Behaviour): Promise<Origin> {
  const log: string[] = [];
  const server = createServer((request, response) => {
    const match = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? "");
    const before = log.push(`${request.method} ${request.headers.range ?? "whole"}`) - 1;
    const range = match ? ([Number(match[1]), Number(match[2]) + 1] as const) : undefined;
    found.behave({ request, response, range, before });
  });
  t.teardown(() => {
    server.closeAllConnections();
    return new Promise((resolve) => server.close(resolve));
  });
  const found: Origin = { url: `http://127.0.0.1:${await listening(server)}/a.eigen`, log, behave };
  return found;
}

/** Answers as a correct server does. @param more headers instead of its own; null leaves one out */
function honest({ response, range }: Asked, more: Record<string, string | number | null> = {}, body = golden): void {
  const [start, end] = range ?? [0, body.length];
  const part = body.subarray(start, end);
  const all = {
    etag: '"one"',
    "content-length": part.length,
    ...(range && { "content-range": `bytes ${start}-${start + part.length - 1}/${body.length}` }),
    ...more,
  };
  response.writeHead(range ? 206 : 200, withoutNull(all)).end(part);
}

function withoutNull(headers: Record<string, string | number | null>): Record<string, string | number> {
  return Object.fromEntries(Object.entries(headers).filter(([, value]) => value !== null)) as never;
}

/** Answers with the whole file, whatever was asked. */
function whole(asked: Asked, more: Record<string, string | number | null> = {}, body: Uint8Array = golden): void {
  honest({ ...asked, range: undefined }, more, Buffer.from(body));
}

const status =
  (code: number, headers: Record<string, string> = {}, body = "no"): Behaviour =>
  ({ response }) =>
    void response.writeHead(code, headers).end(body);

/** Opens a pack and reads a task. */
async function use(url: string, options: OpenOptions = {}): Promise<Pack> {
  const pack = await openPack(url, options);
  await pack.load("whole");
  return pack;
}

/** Options for servers that never answer. */
const QUICK = { timeout: 150, retries: 1 };

interface Row {
  readonly name: string;
  readonly behave: Behaviour;
  readonly message: RegExp;
  /** Number of requests before giving up. */
  readonly requests: number;
  readonly options?: OpenOptions;
  readonly transient: boolean;
}

const fatal = (name: string, behave: Behaviour, message: RegExp, requests = 1, options?: OpenOptions): Row => ({
  ...{ name, behave, message, requests, transient: false },
  ...(options && { options }),
});
/** A failure that may pass: it is tried again, once unless told otherwise. */
const passing = (name: string, behave: Behaviour, message: RegExp, options: OpenOptions = { retries: 1 }): Row => {
  return { name, behave, message, requests: 1 + (options.retries ?? 0), options, transient: true };
};

const later =
  (from: number, behave: Behaviour): Behaviour =>
  (asked) =>
    asked.before < from ? honest(asked) : behave(asked);

const FATAL: readonly Row[] = [
  fatal("404", status(404), /answered 404; check the address/),
  fatal("410", status(410), /answered 410/),
  fatal("401", status(401), /status 401.*headers/),
  fatal("403", status(403), /status 403.*headers/),
  fatal("204", ({ response }) => void response.writeHead(204).end(), /answered 204/),
  fatal("304 for no reason", ({ response }) => void response.writeHead(304).end(), /answered 304/),
  fatal("416", status(416), /status 416.*truncated/),
  fatal("501", status(501), /answered 501/),
  passing(
    "500 for ever",
    status(500),
    /the server cannot answer now \(status 500\); try again later \(tried 2 times\)/,
  ),
  ...[408, 429, 502, 503, 504].map((code) => passing(`${code} for ever`, status(code), new RegExp(`status ${code}`))),
  passing(
    "429 that wants an hour",
    status(429, { "retry-after": "3600" }),
    /too many requests \(status 429\); try again in 3600 s/,
    {},
  ),
  fatal(
    "an HTML page by its type",
    ({ response }) => void response.writeHead(200, { "content-type": "text/html; charset=utf-8" }).end(HTML),
    /a\.eigen: answered an HTML page, not the file/,
  ),
  fatal(
    "an HTML page without a type",
    ({ response }) => void response.writeHead(200).end(`\n ${HTML}`),
    /answered an HTML page/,
  ),
  fatal(
    "an HTML page in ranges",
    (asked) => honest(asked, {}, Buffer.from(HTML.padEnd(5000))),
    /answered an HTML page/,
  ),
  fatal(
    "a login page after a while",
    later(2, status(200, { "content-type": "text/html" }, HTML)),
    /answered an HTML page/,
    3,
  ),
  fatal(
    "another range than asked for",
    (asked) => honest({ ...asked, range: [asked.range![0] + 1, asked.range![1] + 1] }),
    /asked for bytes 0 to 1536, the server sent 1 to 1537/,
  ),
  fatal(
    "a range that is labelled wrongly",
    (asked) => honest(asked, { "content-range": `bytes 5-9/${golden.length}` }),
    /the server sent 5 to 10/,
  ),
  fatal(
    "a file that is shorter than its window",
    (asked) => honest(asked, {}, golden.subarray(0, 500)),
    /ends at byte 500.*truncated/,
  ),
  fatal(
    "less than it labels",
    ({ response, range }) =>
      void response
        .writeHead(206, {
          "content-range": `bytes ${range![0]}-${range![1] - 1}/${golden.length}`,
          "content-length": 10,
        })
        .end(golden.subarray(0, 10)),
    /asked for 1536 bytes, the server announces 10/,
  ),
  passing(
    "less, and says nothing of it",
    ({ response, range }) => void response.writeHead(206).end(golden.subarray(range![0], range![1] - 1)),
    /ended after 1535 of 1536 bytes.*tried 2 times/,
  ),
  fatal(
    "more, announced",
    ({ response }) => void response.writeHead(206, { "content-length": golden.length }).end(golden),
    /asked for 1536 bytes, the server announces/,
  ),
  fatal(
    "more, and more, and no end",
    ({ response }) => {
      response.writeHead(206);
      const more = (): void => void (!response.destroyed && response.write(Buffer.alloc(65536), more));
      more();
    },
    /more than the 1536 bytes asked for arrived/,
  ),
  fatal(
    "compressed ranges",
    ({ response, range }) => {
      const body = gzipSync(golden.subarray(range![0], range![1]));
      response.writeHead(206, { "content-encoding": "gzip", "content-length": body.length }).end(body);
    },
    /compresses ranges \(content-encoding: gzip\)/,
  ),
  passing(
    "a compression that is none",
    ({ response }) => void response.writeHead(200, { "content-encoding": "gzip" }).end(golden),
    /compressed \(content-encoding\)/,
    { retries: 0 },
  ),
  passing(
    "several ranges at once",
    ({ response }) =>
      void response
        .writeHead(206, { "content-type": "multipart/byteranges; boundary=x" })
        .end("--x\r\n\r\nabc\r\n--x--"),
    /ended after \d+ of 1536 bytes/,
    { retries: 0 },
  ),
  fatal(
    "another entity tag",
    later(1, (asked) => honest(asked, { etag: '"two"' })),
    /changed between two reads; open it again/,
    2,
  ),
  fatal(
    "another date",
    (asked) => honest(asked, { etag: null, "last-modified": new Date(1e12 + 1e6 * asked.before).toUTCString() }),
    /changed between two reads/,
    2,
  ),
  fatal(
    "another size",
    later(1, (asked) => honest(asked, {}, Buffer.concat([golden, golden]))),
    /changed between two reads/,
    2,
  ),
  fatal(
    "no entity tag any more",
    later(2, (asked) => honest(asked, { etag: null })),
    /no ETag and no Last-Modified, and others had/,
    3,
  ),
  fatal(
    "whole, and another version",
    later(2, (asked) => whole(asked, { etag: '"two"' })),
    /changed between two reads/,
    3,
  ),
  fatal(
    "whole, and another size",
    later(2, (asked) => whole(asked, { "content-length": null }, Buffer.concat([golden, golden]))),
    /changed between two reads/,
    3,
  ),
  fatal(
    "whole, and larger than allowed",
    (asked) => whole(asked),
    new RegExp(`ignores ranges \\(status 200\\), and the file has ${golden.length} bytes.*maxWholeBytes.*1000`),
    1,
    { maxWholeBytes: 1000 },
  ),
  fatal(
    "whole, and larger than allowed, of hidden size",
    (asked) => whole(asked, { "content-length": null }),
    /the file has more bytes, above `maxWholeBytes`, 1000/,
    1,
    { maxWholeBytes: 1000 },
  ),
  passing("no answer", () => undefined, /no answer within 150 ms.*timeout.*tried 2 times/, QUICK),
  passing(
    "headers, then nothing",
    ({ response, range }) => void response.writeHead(206, { "content-length": range![1] }).flushHeaders(),
    /no byte arrived for 150 ms/,
    QUICK,
  ),
  passing(
    "a byte now and then",
    ({ response, range }) => {
      response.writeHead(206, { "content-length": range![1] - range![0] });
      const timer = setInterval(() => response.write("x"), 40);
      response.on("close", () => clearInterval(timer));
    },
    /only \d+ bytes arrived for 150 ms.*minRate/,
    QUICK,
  ),
  passing(
    "a connection cut in the body",
    ({ response, range }) => {
      response.writeHead(206, { "content-length": range![1] - range![0] });
      response.write(golden.subarray(0, 100), () => response.destroy());
    },
    /cannot be fetched: the server broke the connection off/,
  ),
  passing(
    "a connection cut before the answer",
    ({ request }) => void request.socket.destroy(),
    /cannot be fetched: the server broke the connection off/,
  ),
  fatal(
    "a circle of redirects",
    ({ response, request }) => void response.writeHead(302, { location: request.url! }).end(),
    /cannot be fetched: .*redirect/,
    21,
  ),
];

t.test("what does not pass is named, and costs no request more than it must", async (t) => {
  for (const { name, behave, message, requests, options, transient } of FATAL) {
    const { url, log } = await origin(t, behave);
    const error = await use(url, options).catch((error: unknown) => error);
    t.ok(error instanceof SourceError, `${name}: ${String(error)}`);
    const { message: found, file, transient: passes } = error as SourceError;
    t.match(found, message, name);
    t.equal(file, url, name);
    t.equal(passes === true, transient, `${name}: transient`);
    t.equal(log.length, requests, `${name}: ${log.join(", ")}`);
  }
});

t.test("what passes is tried again, and then it is as if nothing had been", async (t) => {
  const passing: [string, Behaviour][] = [
    ...[408, 429, 500, 502, 503, 504].map((code): [string, Behaviour] => [`${code}`, status(code)]),
    ["429 that wants no wait", status(429, { "retry-after": "0" })],
    ["503 until a date", status(503, { "retry-after": new Date(Date.now() - 1000).toUTCString() })],
    ["cut before the answer", ({ request }) => void request.socket.destroy()],
    [
      "cut in the body",
      ({ response }) => void response.writeHead(206, { etag: '"one"' }).write("x", () => response.destroy()),
    ],
    ["no answer", () => undefined],
  ];
  // All at once: most of the time is a wait between two requests.
  const ask = async ([name, behave]: [string, Behaviour]) => {
    for (const at of [0, 1, 2]) {
      const { url, log } = await origin(t, (asked) => (asked.before === at ? behave(asked) : honest(asked)));
      const pack = await use(url, { timeout: 400 });
      t.equal(log.length, 4, `${name} at request ${at}: ${log.join(", ")}`);
      t.same(log[at], log[at + 1], "the same is asked again");
      t.equal(pack.reads.requests, 4, "and it is counted");
    }
  };
  await Promise.all(passing.map(ask));
  const { url, log } = await origin(t, (asked) => (asked.before < 3 ? status(503)(asked) : honest(asked)));
  await use(url);
  t.equal(log.length, 6, "three times, by default");
  const none = await origin(t, (asked) => (asked.before < 1 ? status(503)(asked) : honest(asked)));
  await t.rejects(use(none.url, { retries: 0 }), { tag: "source", message: /status 503/ });
});

t.test("a pause obeys the signal, and the server's wish", async (t) => {
  const { url, log } = await origin(t, status(503, { "retry-after": "20" }));
  const aborted = new AbortController();
  const opening = openPack(url, { signal: aborted.signal });
  while (log.length === 0) await new Promise((resolve) => setTimeout(resolve, 5));
  setTimeout(() => aborted.abort(new Error("enough")), 20);
  await t.rejects(opening, { message: "enough" });
  t.equal(log.length, 1, "nobody was asked again meanwhile");
  const error = await openPack(url, { timeout: 10_000 }).catch((error: unknown) => error);
  t.match(
    error,
    { status: 503, retryAfter: 20_000, transient: true },
    "a wait above the limit of time is the caller's",
  );
});

t.test("an honest server: three requests to the first task, one for each further", async (t) => {
  const variants: Record<string, string | null>[] = [
    ...[{}, { etag: null }, { etag: 'W/"one"' }, { "content-range": null }, { "content-length": null }],
  ];
  for (const more of variants) {
    const { url, log } = await origin(t, (asked) => honest(asked, more));
    const pack = await use(url);
    t.equal(log.length, 3);
    await pack.load("terms");
    t.equal(log.length, 4);
    t.ok(log.every((line) => line.startsWith("GET bytes=")));
    t.match(pack.reads, { requests: 4, whole: false });
  }
});

t.test("a server without ranges gives the file once", async (t) => {
  const gzip: Behaviour = ({ response }) => {
    const body = gzipSync(golden);
    response.writeHead(200, { "content-encoding": "gzip", "content-length": body.length, etag: '"one"' }).end(body);
  };
  const servers: [string, Behaviour][] = [
    ["plain", (asked) => whole(asked)],
    ["of unknown size", (asked) => whole(asked, { "content-length": null })],
    ["without a version", (asked) => whole(asked, { etag: null })],
    ["compressing", gzip],
  ];
  for (const [name, behave] of servers) {
    const { url, log } = await origin(t, behave);
    const pack = await use(url);
    for (const id of pack.tasks.keys()) await pack.load(id);
    t.equal(log.length, 1, `${name}: one request`);
    t.same({ ...pack.reads }, { requests: 1, bytes: golden.length, whole: true }, name);
    t.same((await pack.load("terms")).bytes, (await (await openPack(golden)).load("terms")).bytes);
  }
  const { url, log } = await origin(
    t,
    later(2, (asked) => setTimeout(() => whole(asked), 30)),
  );
  const pack = await openPack(url);
  await pack.prefetch(["terms", "whole", "head"]);
  t.match(pack.reads, { whole: true });
  const { length } = log;
  t.ok(length <= 5, "ranges until the first whole answer");
  await pack.bases().then((bases) => bases.close());
  t.equal(log.length, length, "then memory");
  const both = await origin(t, (asked) => (asked.before === 0 ? setTimeout(() => whole(asked), 60) : whole(asked)));
  const source = await openSource(both.url);
  const aborted = new AbortController();
  const first = source.read(0, 10, { signal: aborted.signal });
  const second = source.read(10, 10);
  aborted.abort(new Error("mine only"));
  await t.rejects(first, { message: "mine only" });
  t.same(await second, new Uint8Array(golden.subarray(10, 20)), "an abort is no other read's");
});

t.test("what is read whole is asked for whole, once", async (t) => {
  const model = await readFile(data("onnx/bert-torchscript.onnx"));
  const { url, log } = await origin(t, (asked) => honest(asked, {}, model));
  const read = await readModel(url);
  t.same([log, read.bytes.length], [["GET whole"], model.length]);
  log.length = 0;
  const page = await origin(t, status(200, { "content-type": "text/html" }, HTML));
  await t.rejects(readModel(page.url), { tag: "source", message: /answered an HTML page/ });
  const cut = await origin(t, (asked) =>
    asked.before === 0
      ? void asked.response
          .writeHead(200, { "content-length": model.length })
          .write("x", () => asked.response.destroy())
      : honest(asked, {}, model),
  );
  t.equal((await readModel(cut.url)).bytes.length, model.length);
  t.equal(cut.log.length, 2);
});

t.test("memory follows what arrives, not what is promised", async (t) => {
  const { url } = await origin(t, ({ response }) => {
    response.writeHead(206, { "content-length": 3e9, etag: '"one"' });
    response.write("x", () => setTimeout(() => response.destroy(), 100));
  });
  const source = await openSource(url, { retries: 0 });
  const sizes: number[] = [];
  const native = Uint8Array;
  globalThis.Uint8Array = new Proxy(native, {
    construct(target, args: unknown[], newTarget) {
      if (typeof args[0] === "number") sizes.push(args[0]);
      return Reflect.construct(target, args, newTarget) as Uint8Array;
    },
  });
  try {
    await t.rejects(source.read(0, 3e9), { tag: "source", message: /./ });
  } finally {
    globalThis.Uint8Array = native;
  }
  t.ok(
    sizes.every((size) => size <= 2 ** 20),
    `allocated: ${sizes.join(", ")}`,
  );

  const large = Buffer.alloc(5_000_001, "eigenlora");
  const good = await origin(t, (asked) => honest(asked, {}, large));
  t.ok(large.equals(await (await openSource(good.url)).read(0, large.length)), "growing loses nothing");
  t.ok(large.subarray(7).equals(await (await openSource(good.url)).read(7, large.length - 7)));
});

t.test("no server at all", async (t) => {
  const tcp = (talk: (socket: Socket) => void): Promise<string> => {
    const server = createTcpServer(talk);
    t.teardown(() => void server.close());
    return listening(server).then((port) => `127.0.0.1:${port}`);
  };
  const gone = createTcpServer();
  const closed = `127.0.0.1:${await listening(gone)}`;
  await new Promise((resolve) => gone.close(resolve));
  const causes: [string, string, RegExp, boolean][] = [
    ["DNS", "http://no-such-host.invalid/a.eigen", /the host no-such-host\.invalid cannot be found \(DNS\)/, true],
    ["refused", `http://${closed}/a`, /127\.0\.0\.1:\d+ refuses the connection; check the port/, true],
    ["reset", `http://${await tcp((s) => void s.resetAndDestroy())}/a`, /the server broke the connection off/, true],
    [
      "no TLS",
      `https://${await tcp((s) => void s.end("HTTP/1.1 400 no\r\n\r\n"))}/a`,
      /no secure connection to/,
      false,
    ],
    ["no HTTP", `http://${await tcp((s) => void s.end("SSH-2.0\r\n"))}/a`, /answers something else than HTTP/, false],
  ];
  for (const [name, url, message, transient] of causes) {
    const error = await openPack(url, { retries: 1 }).catch((error: unknown) => error);
    t.match(error, { tag: "source", message }, `${name}: ${String(error)}`);
    t.equal((error as SourceError).transient === true, transient, `${name}: transient`);
    t.equal(/tried 2 times/.test((error as Error).message), transient, `${name}: tries`);
  }
});

t.test("secrets of an address stay out of messages", async (t) => {
  const { url } = await origin(t, status(404));
  const error = (await openPack(`${url}?token=secret#part`).catch((error: unknown) => error)) as SourceError;
  t.equal(error.file, `${url}?…`);
  t.notMatch(error.message, /secret/);
  const failing = (async (input: string) => {
    throw new TypeError(`error sending request for url (${input})`);
  }) as typeof fetch;
  const thrown = (await openPack(`${url}?token=secret`, { fetch: failing, retries: 0 }).catch(
    (e: unknown) => e,
  )) as Error;
  t.match(thrown, { tag: "source", message: /error sending request for url \(.*\?…\)/ });
  t.notMatch(thrown.message, /secret/);
  const withPassword = (await openPack("http://me:secret@127.0.0.1:1/a").catch((e: unknown) => e)) as Error;
  t.match(withPassword, { name: "TypeError", message: /headers/ });
  t.notMatch(withPassword.message, /secret/);
  const pack = await openSource(`data:application/octet-stream;base64,${golden.toString("base64")}`);
  t.equal(pack.name, "data: URL");
  t.equal((await openPack(pack)).tasks.size, 5, "a data: URL is read whole");
});

t.test("options", async (t) => {
  for (const options of [{ timeout: -1 }, { retries: Number.NaN }, { minRate: "1" }, { maxWholeBytes: -5 }])
    await t.rejects(
      openPack("http://127.0.0.1:1/a", options as OpenOptions),
      { name: /RangeError/ },
      JSON.stringify(options),
    );
  await t.rejects(openPack("http://127.0.0.1:1/a", { headers: { authorization: "…" } }), TypeError);
  await t.rejects(openPack("http://127.0.0.1:1/a", { retry: 3 } as OpenOptions), /did you mean "retries"/);
  const { url } = await origin(t, (asked) => honest(asked));
  t.ok(await use(url, { timeout: Infinity, minRate: 0, retries: Infinity }));
});
