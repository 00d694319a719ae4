/**
 * README's lines on real servers that people run pages on, in Chromium: open a pack by URL, switch, run.
 * docs/hosting.md shows this table. EIGENLORA_RUNTIMES names a folder whose `node_modules` has vite, webpack,
 * webpack-dev-server and serve; nginx is Debian's. A missing server is skipped by name, and fails when
 * EIGENLORA_REQUIRE lists it. `npm run soak` tries Next.js.
 */
import { execFile, spawn } from "node:child_process";
import { copyFile, cp, mkdir, readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { type AddressInfo, createServer } from "node:net";
import { join } from "node:path";
import { setTimeout as pause } from "node:timers/promises";
import { promisify } from "node:util";
import t, { type Test } from "tap";
import { answerOf, launch, noChromium } from "../support/browser.ts";
import { folderFor, fromRoot } from "../support/folder.ts";
import { serve } from "../support/range-server.ts";
import { MODULE } from "../support/readme.ts";
import { lacking, packages, python, pythonLacks, without } from "../support/required.ts";
import { difference, golden, modelBytes, packBytes } from "../support/sessions.ts";

const root = fromRoot("");

/** The page, which also reports what the test asks for, in addition to the answer. */
const PAGE = `import { openPack } from "eigenlora";
import { main } from "./example.js";

async function answer() {
  const logits = await main("model.onnx");
  // Another address: after a first answer with all of it, the browser's cache gives ranges itself.
  const pack = await openPack("tasks.eigen?2");
  await pack.load("two");
  const missing = await openPack("no-such.eigen").then(() => "opened", (error) => error.message);
  return { logits, reads: { ...pack.reads }, missing };
}
globalThis.answer = answer();
`;

/** Answer of the page. */
interface Answer {
  logits: number[];
  reads: { requests: number; bytes: number; whole: boolean };
  missing: string;
}

const pack = await packBytes(["adapters"], "base");
const temporary = folderFor(t);
const ORT = join(root, "node_modules/onnxruntime-web");

async function addSources(folder: string): Promise<void> {
  await writeFile(join(folder, "main.js"), PAGE);
  await writeFile(join(folder, "example.js"), MODULE);
}

async function addData(folder: string): Promise<void> {
  await writeFile(join(folder, "tasks.eigen"), pack);
  await writeFile(join(folder, "model.onnx"), modelBytes("torchscript"));
}

/** A project for bundlers; what is served as it is lies in public/. */
async function makeProject(): Promise<string> {
  const project = join(temporary, "project");
  for (const part of ["dist", "package.json"])
    await cp(join(root, part), join(project, "node_modules/eigenlora", part), { recursive: true });
  // All of onnxruntime-web is 130 MB.
  await mkdir(join(project, "node_modules/onnxruntime-web/dist"), { recursive: true });
  const build = "dist/ort-wasm-simd-threaded";
  for (const file of ["package.json", "dist/ort.wasm.bundle.min.mjs", `${build}.mjs`, `${build}.wasm`])
    await copyFile(join(ORT, file), join(project, "node_modules/onnxruntime-web", file));
  await mkdir(join(project, "public"));
  await writeFile(join(project, "package.json"), '{"type":"module","private":true}');
  await addSources(project);
  await writeFile(join(project, "index.html"), '<!doctype html><script type="module" src="/main.js"></script>');
  await writeFile(join(project, "public/empty.mjs"), "");
  await addData(join(project, "public"));
  return project;
}

/**
 * The same page without a bundler: the file of `eigenlora/browser`, and one of onnxruntime-web with its WebAssembly.
 */
async function makeFolder(): Promise<string> {
  const folder = join(temporary, "folder");
  await mkdir(folder);
  await copyFile(join(root, "dist/browser.js"), join(folder, "eigenlora.js"));
  await copyFile(join(ORT, "dist/ort.wasm.bundle.min.mjs"), join(folder, "ort.js"));
  await copyFile(join(ORT, "dist/ort-wasm-simd-threaded.wasm"), join(folder, "ort-wasm-simd-threaded.wasm"));
  const imports = {
    eigenlora: "./eigenlora.js",
    "eigenlora/onnxruntime": "./eigenlora.js",
    "onnxruntime-web/wasm": "./ort.js",
  };
  const map = `<script type="importmap">${JSON.stringify({ imports })}</script>`;
  await writeFile(join(folder, "index.html"), `<!doctype html>${map}<script type="module" src="main.js"></script>`);
  await addSources(folder);
  await writeFile(join(folder, "empty.mjs"), "");
  await addData(folder);
  return folder;
}

/** Starts a server on a folder or project until the test ends. @returns its address */
type Start = (t: Test, place: string) => Promise<string>;

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/** A server that is a process of its own. */
function command(path: string, argumentsOf: (port: number, place: string) => string[] | Promise<string[]>): Start {
  return async (t, cwd) => {
    const port = await freePort();
    const child = spawn(path, await argumentsOf(port, cwd), { cwd, stdio: ["ignore", "pipe", "pipe"] });
    let said = "";
    for (const stream of [child.stdout, child.stderr]) stream.on("data", (text) => (said += text));
    const gone = new Promise<void>(
      (resolve) =>
        void child
          .once("close", () => resolve())
          .once("error", (error) => {
            said += error.message;
            resolve();
          }),
    );
    let running = true;
    void gone.then(() => (running = false));
    t.teardown(() => (child.kill(), gone));
    const url = `http://127.0.0.1:${port}/`;
    for (;;) {
      if (!running) throw new Error(`${path}: ended (${child.exitCode})\n${said}`);
      if (
        await fetch(url).then(
          ({ ok }) => ok,
          () => false,
        )
      )
        return url;
      await pause(50);
    }
  };
}

const VITE = packages("vite/bin/vite.js");
const vite = (...args: string[]): Start =>
  command(process.execPath, (port) => [VITE, ...args, "--host", "127.0.0.1", "--port", `${port}`, "--strictPort"]);

const vitePreview: Start = async (t, project) => {
  await promisify(execFile)(process.execPath, [VITE, "build", "--logLevel", "error"], { cwd: project });
  return vite("preview")(t, project);
};

const webpackDevServer: Start = async (t, project) => {
  const require = createRequire(packages("index.js"));
  await writeFile(join(project, "public/index.html"), '<!doctype html><script src="/main.js"></script>');
  const quiet = { stats: "none", infrastructureLogging: { level: "none" } };
  const compiler = require("webpack")({ mode: "development", context: project, entry: "./main.js", ...quiet });
  const port = await freePort();
  const options = { host: "127.0.0.1", port, static: join(project, "public"), historyApiFallback: true };
  const server = new (require("webpack-dev-server"))(options, compiler);
  await server.start();
  t.teardown(() => server.stop());
  return `http://127.0.0.1:${port}/`;
};

/** Sets the types of files, and what else of Debian's nginx.conf a page may notice. */
const nginx = command("nginx", async (port, folder) => {
  const file = join(temporary, "nginx.conf");
  const server = `server { listen 127.0.0.1:${port}; root ${folder}; location / { try_files $uri $uri/ =404; } }`;
  const types = "include /etc/nginx/mime.types; default_type application/octet-stream;";
  const http = `http { ${types} sendfile on; tcp_nopush on; gzip on; access_log off; ${server} }`;
  await writeFile(file, `daemon off; pid nginx.pid; user root; events {} ${http}`);
  return ["-p", temporary, "-c", file, "-e", "stderr"];
});

const HTML = /answered an HTML page, not the file: .*check the address/;
const NOT_FOUND = /the server answered 404; check the address/;

interface Server {
  readonly start: Start;
  /** Reason to skip it. */
  readonly lacks: string | false;
  /** True if it serves a bundler's project. */
  readonly project: boolean;
  /** True if it answers ranges. */
  readonly ranges: boolean;
  /** The type of an .mjs file; browsers run only JavaScript types. */
  readonly mjs: string;
  /** Pattern of the answer for an address that does not exist. */
  readonly missing: RegExp;
}

const noVite = without("vite", VITE);
const noWebpack = without("webpack", packages("webpack-dev-server/package.json"));
const SERVE = packages("serve/build/main.js");
const serveHandler = command(process.execPath, (port) => [SERVE, "-l", `tcp://127.0.0.1:${port}`, "-n", "-L"]);
const python3 = command(python, (port) => ["-m", "http.server", `${port}`, "--bind", "127.0.0.1"]);
const noPython = lacking("python", pythonLacks("http.server"));
const [TEXT, APPLICATION, OCTETS] = ["text/javascript", "application/javascript", "application/octet-stream"] as const;
const bundled = { project: true, ranges: true };
const files = { project: false, ranges: true, missing: NOT_FOUND };

const SERVERS: Record<string, Server> = {
  vite: { ...bundled, start: vite(), lacks: noVite, mjs: TEXT, missing: HTML },
  "vite preview": { ...bundled, start: vitePreview, lacks: noVite, mjs: TEXT, missing: HTML },
  "webpack-dev-server": { ...bundled, start: webpackDevServer, lacks: noWebpack, mjs: APPLICATION, missing: NOT_FOUND },
  "python3 -m http.server": { ...files, ranges: false, start: python3, lacks: noPython, mjs: TEXT },
  serve: { ...files, start: serveHandler, lacks: without("serve", SERVE), mjs: APPLICATION },
  nginx: { ...files, start: nginx, lacks: without("nginx", "/usr/sbin/nginx"), mjs: OCTETS },
};

const [project, folder] = [await makeProject(), await makeFolder()];
const browser = noChromium ? undefined : await launch(t);

for (const [name, { start, lacks, project: isProject, ranges, mjs, missing }] of Object.entries(SERVERS)) {
  t.test(name, { skip: noChromium || lacks, timeout: 120_000 }, async (t) => {
    const url = await start(t, isProject ? project : folder);
    const page = await browser!.newPage();
    page.on("pageerror", (error) => t.fail(`uncaught in the page: ${error.stack}`));
    await page.goto(url);
    const found = (await answerOf(page)) as Answer;
    await page.close();
    t.ok(difference(found.logits, golden("base", "two")) < 1e-5, "PEFT's logits");
    t.equal(
      found.reads.whole,
      !ranges,
      `${found.reads.requests} requests, ${found.reads.bytes} of ${pack.length} bytes`,
    );
    t.equal(found.reads.requests, ranges ? 3 : 1);
    t.match(found.missing, missing);
    t.equal((await fetch(`${url}empty.mjs`)).headers.get("content-type")?.split(";")[0], mjs);
  });
}

t.test("a pack of another origin", { skip: noChromium }, async (t) => {
  const eigenlora = await readFile(join(root, "dist/browser.js"));
  const site = await serve(new Map(Object.entries({ "index.html": new Uint8Array(), "eigenlora.js": eigenlora })));
  const host = await serve(new Map([["tasks.eigen", pack]]));
  t.teardown(() => Promise.all([site.close(), host.close()]));
  const page = await browser!.newPage();
  await page.goto(site.url("index.html"));
  const open = (headers: Record<string, string>): Promise<unknown> => {
    Object.assign(host, { headers, methods: [] });
    return page.evaluate(`import("/eigenlora.js")
      .then(({ openPack }) => openPack("${host.url("tasks.eigen")}?${Object.keys(headers).length}", { retries: 0 }))
      .then(async (pack) => { await pack.load("two"); return pack.reads; })
      .catch((error) => error.message)`);
  };
  const allowed = { "access-control-allow-origin": "*" };
  for (const headers of [
    allowed,
    { ...allowed, "access-control-expose-headers": "Content-Range, Content-Length, ETag" },
  ]) {
    t.match(await open(headers), { requests: 3, whole: false }, Object.keys(headers).join());
    t.same(host.methods, ["GET", "GET", "GET"], "no preflight");
  }
  t.match(await open({}), /does not let .* read it \(header Access-Control-Allow-Origin\)/);
});
