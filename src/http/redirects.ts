/**
 * Redirects, followed one by one: `fetch` takes headers along to other hosts, all but `authorization`.
 */

const MOST_REDIRECTS = 10;

/**
 * Asks an address, and the ones that its answers lead to.
 * @param ask one request; `own` says whether all addresses so far have the origin of the first, which alone may see what is secret
 * @param fail throws an error with this message
 * @returns the first answer that leads nowhere
 */
export async function follow(
  first: URL,
  ask: (url: URL, own: boolean) => Promise<Response>,
  fail: (message: string) => never,
): Promise<Response> {
  let [url, own] = [first, true];
  for (let hops = 0; hops < MOST_REDIRECTS; hops++) {
    const response = await ask(url, own);
    const { status, headers, type } = response;
    if (type === "opaqueredirect") {
      const advice = "give the address where the file lies, or no headers but authorization";
      fail(`redirects, and a browser does not show where to: \`headers\` could reach another host; ${advice}`);
    }
    const location = [301, 302, 303, 307, 308].includes(status) ? headers.get("location") : null;
    if (location === null) return response;
    void response.body?.cancel().catch(() => undefined);
    const next = addressFrom(location, url);
    if (!next || (url.protocol === "https:" && next.protocol === "http:"))
      fail(`redirects from ${url.protocol}//${url.host} to what is no address, or a less safe one`);
    own &&= next!.origin === url.origin;
    url = next!;
  }
  return fail(`redirects more than ${MOST_REDIRECTS} times`);
}

function addressFrom(location: string, base: URL): URL | undefined {
  try {
    const url = new URL(location, base);
    return /^https?:$/.test(url.protocol) ? url : undefined;
  } catch {
    return undefined;
  }
}
