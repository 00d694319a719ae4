/**
 * Why nothing came: what `fetch` says in a different way in each runtime, and hides in a chain of causes, in plain words.
 */

/** Words for a failure, and whether another try may help. */
export interface Cause {
  readonly message: string;
  readonly transient: boolean;
}

/** Codes and messages of Node, Deno and Bun; the first that matches counts. */
const KNOWN: readonly (readonly [pattern: RegExp, transient: boolean, say: (host: string) => string])[] = [
  [
    /ENOTFOUND|EAI_|dns error|failed to lookup|resolve host/i,
    true,
    (host) => `the host ${host} cannot be found (DNS); check the address and the network`,
  ],
  [
    /ECONNREFUSED|ConnectionRefused|connection refused|unable to connect/i,
    true,
    (host) => `${host} refuses the connection; check the port, and that the server runs`,
  ],
  [
    /ETIMEDOUT|UND_ERR_\w*TIMEOUT|EHOSTUNREACH|ENETUNREACH|ENETDOWN|timed out/i,
    true,
    (host) => `${host} cannot be reached; check the network`,
  ],
  [
    /CERT|ERR_SSL|ERR_TLS|EPROTO|UNABLE_TO_|certificate|\b(tls|ssl)\b|corrupt message/i,
    false,
    (host) => `no secure connection to ${host}; check its certificate, and that it speaks https on this port`,
  ],
  [/HPE_|invalid http|UND_ERR_INVALID/i, false, (host) => `${host} answers something else than HTTP; check the port`],
  [
    /Z_\w+_ERROR|zlib|brotli|decompress/i,
    true,
    () => "the answer says that it is compressed (content-encoding), and cannot be decompressed",
  ],
  [
    /ECONNRESET|EPIPE|ECONNABORTED|UND_ERR_SOCKET|ConnectionClosed|other side closed|reset|closed|terminated|reading a body/i,
    true,
    () => "the server broke the connection off",
  ],
];

/** @param error what `fetch`, or reading a body, threw */
export function causeOf(error: unknown, url: URL): Cause {
  if (error instanceof RangeError) return { message: `there is no memory for it (${error.message})`, transient: false };
  const details = chainOf(error);
  const inner = details.slice(1);
  // Some runtimes repeat the address, which may hold any word.
  const text = details.join(" ").replaceAll(url.href, "").replaceAll(url.hostname, "");
  const known = KNOWN.find(([pattern]) => pattern.test(text));
  if (known)
    return { message: `${known[2](url.host)} (${inner[inner.length - 1] ?? details[0]})`, transient: known[1] };
  const network = error instanceof TypeError;
  // Browsers keep the cause from scripts: a page must not explore a network by it.
  if (network && inner.length === 0) return opaque(error.message, url);
  return { message: details.join(": "), transient: network && inner.length === 0 };
}

/** An error and its causes, outermost first: code and message of each. */
function chainOf(error: unknown): string[] {
  const found: string[] = [];
  for (let at = error as Partial<AggregateError & { code: unknown }> | undefined; at && found.length < 8; ) {
    const message = typeof at.message === "string" ? at.message : String(at);
    found.push(typeof at.code === "string" && !message.includes(at.code) ? `${at.code} ${message}`.trim() : message);
    at = (at.cause ?? at.errors?.[0]) as typeof at;
  }
  return found;
}

/** What a browser's "Failed to fetch" can mean for this address. */
function opaque(message: string, url: URL): Cause {
  const { location, navigator } = globalThis as Partial<typeof globalThis>;
  if (navigator?.onLine === false) return { message: `${message}: the browser is offline`, transient: true };
  if (location?.protocol === "https:" && url.protocol === "http:")
    return { message: `${message}: a page over https may read over https only`, transient: false };
  if (!location) return { message, transient: true };
  const { origin } = location;
  const guesses =
    origin === url.origin
      ? "the network or the server is gone"
      : `no network, no such host, or ${url.host} does not let ${origin} read it (header Access-Control-Allow-Origin)`;
  return { message: `${message}: ${guesses}; the console of the browser says more`, transient: true };
}
