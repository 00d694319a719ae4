/**
 * Addresses stay where they lead: names of the Hub in their repository, headers with their host, files of a model in
 * its folder. On real sockets, in Node and in Chromium, and over thousands of spellings.
 */
import { readFileSync } from "node:fs";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { build } from "esbuild";
import t, { type Test } from "tap";
import { type HubName, hubName, openSource, uniform } from "../support/internals/base.ts";
import { data } from "../support/packs.ts";

/** The package's entry for browsers, in this process. */
async function browserBuild(
  t: Test,
): Promise<typeof import("eigenlora") & typeof import("eigenlora/cache") & typeof import("eigenlora/onnx")> {
  const exports = { openPack: "", cachedSource: "/cache", openOnnxHost: "/onnx" };
  const lines = Object.entries(exports).map(([name, path]) => `export { ${name} } from "eigenlora${path}";`);
  const { outputFiles } = await build({
    stdin: { contents: lines.join(""), resolveDir: data("../..") },
    ...{ bundle: true, format: "esm", platform: "browser", write: false, logLevel: "silent" },
  });
  return import(`${t.testdir({ "browser.mjs": outputFiles[0]!.text })}/browser.mjs`);
}

const NAMES = [
  "@main/../../../../evil/repo/resolve/main/x.eigen",
  "@../../../evil/repo/resolve/main/x.eigen",
  "@%2e%2e/..%2f../evil/repo/x.eigen",
  "@..\\..\\..\\evil/repo/resolve/main/x.eigen",
  "@main/..\\..\\..\\..\\evil/repo/x.eigen",
  "@main/.\t./.\t./.\t./.\t./evil/repo/x.eigen",
  "@main/%2e%2e/%2e%2e/%2e%2e/%2e%2e/evil/repo/x.eigen",
  "@.\n./x.eigen",
  "/../other/resolve/main/x.eigen",
];

t.test("a name of the Hub stays in its repository, in browsers as in Node", async (t) => {
  const browser = await browserBuild(t);
  const asked: string[] = [];
  const fetch = async (url: string): Promise<Response> => {
    asked.push(url);
    return new Response("no", { status: 404 });
  };
  const store = { get: async () => undefined, put: async () => {}, delete: async () => {}, keys: async () => [] };
  const problems: string[] = [];
  /**
   * Tries a name in the browser's build, by itself or through a cache, and holds what was asked against what Node reads
   * in the name.
   */
  const check = async (text: string, cached = false): Promise<"refused" | "asked"> => {
    const input = cached ? browser.cachedSource(text, store, { fetch }) : text;
    const error = await browser.openPack(input, cached ? {} : { fetch }).catch((error: unknown) => error);
    const [url] = asked.splice(0);
    const inNode = await Promise.resolve(text)
      .then(hubName)
      .catch((error: unknown) => error);
    if (url === undefined) {
      const refused = error instanceof TypeError && (inNode instanceof TypeError || (inNode as HubName).path === "");
      if (!refused) problems.push(`${JSON.stringify(text)}: ${String(error)}, in Node ${JSON.stringify(inNode)}`);
      return "refused";
    }
    const { origin, pathname } = new URL(url);
    const [org, repository, resolve, revision, ...path] = pathname.slice(1).split("/").map(decodeURIComponent);
    const found = { repository: `${org}/${repository}`, revision, path: path.join("/") };
    const same = JSON.stringify(found) === JSON.stringify(inNode) && found.repository === "org/name";
    if (!same || origin !== "https://huggingface.co" || resolve !== "resolve")
      problems.push(`${JSON.stringify(text)}: asked ${url}`);
    return "asked";
  };
  for (const name of NAMES)
    for (const start of ["hf:org/name", "hf://org/name", "HF:org/name"])
      for (const cached of [false, true]) {
        const outcome = await check(start + name, cached);
        // Names of files, spelt in full: no server takes them for a folder's parent.
        if (!/%2e%2e\/%2e%2e|\t/.test(name) && outcome === "asked") problems.push(JSON.stringify(start + name));
      }
  const pieces = [
    ..."/ / / .. . %2e %2E%2e %252e%252e %2f %5c \\ @ # ? : // evil x.eigen main refs/pr/1 ä % %zz c: ~ ;".split(" "),
    ...[..."\t\n\r \0\u007f\u202e", "\ud800"],
  ];
  const random = uniform(8);
  const count = { refused: 0, asked: 0 };
  for (let i = 0; i < 4000; i++) {
    const length = 1 + Math.floor(random() * 9);
    const rest = Array.from({ length }, () => pieces[Math.floor(random() * pieces.length)]!).join("");
    const start = ["hf:org/name/", "hf:org/name@", "hf://org/name/", "hf:org/name"][i % 4]!;
    // Letters of the repository's own name make another repository, which is no escape.
    if (start.endsWith("name") && !/^[/@]/.test(rest)) continue;
    count[await check(start + rest, i % 5 === 0)]++;
  }
  t.same(problems, []);
  t.ok(count.refused > 500 && count.asked > 500, `${count.refused} refused, ${count.asked} asked`);
});

/** A server that notes what it is sent. */
interface Host {
  readonly origin: string;
  readonly seen: {
    url: string;
    key: string | undefined;
    authorization: string | undefined;
    range: string | undefined;
  }[];
}

async function host(
  t: Test,
  answer: (url: string, request: IncomingMessage, response: ServerResponse) => void,
): Promise<Host> {
  const seen: Host["seen"] = [];
  const server = createServer((request, response) => {
    response.setHeader("access-control-allow-origin", "*");
    response.setHeader("access-control-allow-headers", "x-api-key, authorization, range");
    if (request.method === "OPTIONS") return void response.writeHead(204).end();
    const { url = "", headers } = request;
    const { authorization, range } = headers;
    seen.push({ url, key: headers["x-api-key"] as string | undefined, authorization, range });
    answer(url, request, response);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  t.teardown(() => {
    server.closeAllConnections();
    return new Promise((resolve) => server.close(resolve));
  });
  return { origin: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, seen };
}

/** Two hosts: one that redirects, to itself or to the other, and one that has the file. */
async function hosts(t: Test): Promise<{ own: Host; other: Host }> {
  const other: Host = await host(t, (url, _, response) => {
    if (url === "/back") response.writeHead(302, { location: `${own.origin}/file` }).end();
    else response.writeHead(206, { "content-range": "bytes 0-3/4", etag: '"a"' }).end("data");
  });
  const own: Host = await host(t, (url, _, response) => {
    const [, status, to] = /^\/(30\d)\/(.*)$/.exec(url) ?? [];
    const targets: Record<string, string> = {
      own: "/file",
      other: `${other.origin}/file?signature=secret`,
      back: `${other.origin}/back`,
    };
    if (status) response.writeHead(Number(status), { location: targets[to!] ?? to! }).end();
    else response.writeHead(206, { "content-range": "bytes 0-3/4", etag: '"a"' }).end("data");
  });
  return { own, other };
}

const SECRETS = { "x-api-key": "secret", authorization: "Bearer secret" };

t.test("headers stay with their host, whatever it redirects to", async (t) => {
  const { own, other } = await hosts(t);
  for (const headers of [SECRETS, { Authorization: SECRETS.authorization }]) {
    const { authorization } = SECRETS;
    const key = headers === SECRETS ? "secret" : undefined;
    for (const status of [301, 302, 303, 307, 308]) {
      const source = await openSource(`${own.origin}/${status}/own`, { headers });
      t.equal(Buffer.from(await source.read(0, 4)).toString(), "data");
      t.match(own.seen.splice(0), [
        { authorization, key },
        { url: "/file", authorization, key, range: "bytes=0-3" },
      ]);
      for (const to of ["other", "back"]) {
        const source = await openSource(`${own.origin}/${status}/${to}`, { headers });
        t.equal(Buffer.from(await source.read(0, 4)).toString(), "data");
        const [first, ...later] = own.seen.splice(0);
        t.match(first, { authorization, key });
        for (const one of [...other.seen.splice(0), ...later])
          t.same(
            one,
            { ...one, key: undefined, authorization: undefined, range: "bytes=0-3" },
            `${status}, ${to}: ${one.url}`,
          );
      }
    }
  }
  for (const to of ["file:///etc/passwd", "data:,data", "http://["]) {
    own.seen.length = 0;
    const source = await openSource(`${own.origin}/302/${to}`, { headers: SECRETS });
    const message = /redirects from http:\/\/127.0.0.1:\d+ to what is no address/;
    await t.rejects(source.read(0, 4), { tag: "source", message }, to);
    t.equal(own.seen.length, 1, "and nobody is asked again");
  }
  const circle = await host(t, (url, _, response) => void response.writeHead(302, { location: url }).end());
  await t.rejects((await openSource(`${circle.origin}/a`, { headers: SECRETS })).read(0, 4), {
    message: /redirects more than 10 times/,
  });
  t.equal(circle.seen.length, 10);
});

t.test("files of a model stay in its folder, whatever an address makes of their names", async (t) => {
  const browser = await browserBuild(t);
  const model = readFileSync(data("onnx/external.onnx")).toString("latin1");
  const name = "external.onnx.data";
  const page = { href: "https://app.example/page/index.html" };
  t.teardown(() => Reflect.deleteProperty(globalThis, "location"));
  Object.defineProperty(globalThis, "location", { value: page, configurable: true });
  for (const location of ["\thttps://evil.ex/x", "%2e%2e/%2e%2e/evil", ".\t./.\t./evil/data", "a?b#c/%2e%2e/evil/"]) {
    const evil = Buffer.from(model.replaceAll(name, location.padEnd(name.length, "x")), "latin1");
    for (const [input, home] of [
      ["models/model.onnx", "https://app.example/page/models/"],
      ["https://host.example/models/model.onnx?v=2", "https://host.example/models/"],
      ["hf:org/name/models/model.onnx", "https://huggingface.co/org/name/resolve/main/models/"],
    ] as const) {
      const asked: string[] = [];
      const fetch = async (url: string): Promise<Response> => {
        asked.push(new URL(url).href);
        return url.includes("model.onnx") ? new Response(evil) : new Response("no", { status: 404 });
      };
      const host = await browser.openOnnxHost(input, { fetch, headers: { authorization: "secret" } });
      for (const { name } of host.list()) await host.read(name).catch(() => undefined);
      const outside = asked.filter((url) => !url.startsWith(home) || url.slice(home.length).includes("/../"));
      t.same(outside, [], `${JSON.stringify(location)} of ${input}`);
      t.ok(asked.length > 0);
    }
  }
});
