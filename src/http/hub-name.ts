/**
 * Names of files on the Hugging Face Hub, and their addresses: `hf:org/name@revision/folder/file`, as `hf://…` too,
 * which is how huggingface_hub writes them.
 */

import type { FetchOptions } from "../source.ts";

/** A repository of the Hub, or a file or folder in it. */
export interface HubName {
  /** "org/name". */
  readonly repository: string;
  /** A branch, tag or commit; "main" where none is named. */
  readonly revision: string;
  /** Path in the repository; "" is its root. */
  readonly path: string;
}

const HUB = "https://huggingface.co";

/** Variables of the environment, which browsers do not have. */
const environment = (): NodeJS.ProcessEnv => globalThis.process?.env ?? {};

/** Address of the Hub, or of the mirror that HF_ENDPOINT names. @throws TypeError when that is no address */
export function hubEndpoint(): string {
  const endpoint = environment()["HF_ENDPOINT"] || HUB;
  if (/^https?:\/\/[^/]/.test(endpoint)) return endpoint.replace(/\/+$/, "");
  throw new TypeError(`HF_ENDPOINT is "${endpoint}", expected an address such as ${HUB}`);
}

/**
 * Headers that only the Hub may see, by names in lower case: those given, and the token of HF_TOKEN, or else `token`.
 */
export function hubHeaders({ headers = {} }: FetchOptions, token = ""): Record<string, string> {
  const authorization = (environment()["HF_TOKEN"] || token).trim();
  const given = Object.entries(headers).map(([name, value]) => [name.toLowerCase(), value]);
  return { ...(authorization !== "" && { authorization: `Bearer ${authorization}` }), ...Object.fromEntries(given) };
}

/** Collections of the Hub other than models, in front of org/name. */
const OTHERS = /^(datasets|spaces|kernels|buckets|collections|papers)\//;
/** org/name, @revision, /path. A revision with a slash is spelt %2F, but for those of pull requests and conversions. */
const NAME = /^([^/@]+\/[^/@]+)(?:@(refs\/(?:pr|convert)\/[^/]+|[^/]*))?(?:\/(.*))?$/;

/**
 * The address of a file, `hf:org/name@revision/file`, from which it is read by ranges.
 * @throws TypeError for a name that is not well formed, or that names no file
 */
export function hubFile(text: string): URL {
  const name = parsed(text, text);
  if (name.path === "") throw new TypeError(`${text}: names a repository, and a file of it is needed`);
  return hubUrl(hubEndpoint(), name);
}

/**
 * The address of a file.
 * @param endpoint of the Hub or of a mirror
 * @throws TypeError when a parser of addresses would leave the repository
 */
export function hubUrl(endpoint: string, { repository, revision, path }: HubName): URL {
  const home = `${endpoint}/${repository}/resolve/`;
  const url = new URL(home + [revision, ...path.split("/")].map(encodeURIComponent).join("/"));
  if (!url.href.startsWith(new URL(home).href)) throw new TypeError(`${url.href}: lies outside ${home}`);
  return url;
}

/**
 * @param body a name with or without `hf:`; `text` is what messages quote
 * @throws TypeError when it is not well formed
 */
export function parsed(body: string, text: string): HubName {
  const refuse = (problem: string): never => {
    throw new TypeError(`${text}: ${problem}; expected hf:org/name, hf:org/name@revision or hf:org/name/folder/file`);
  };
  const name = body.replace(/^hf:(\/\/(models\/)?)?/i, "");
  const [other] = OTHERS.exec(name) ?? [];
  if (other) refuse(`names one of the Hub's ${other.slice(0, -1)}, not the repository of a model`);
  const [, repository = "", given = "main", trail = ""] = NAME.exec(name) ?? [];
  const path = trail.replace(/\/+$/, "");
  const revision = decoded(given);
  // They become paths in the cache, where -- stands for the slash.
  if (!/^\w[\w.-]*\/\w[\w.-]*$/.test(repository) || /\.\.|--/.test(repository)) refuse("names no repository");
  if (/^[/.]|[\s\p{Cc}\p{Cs}~^:?*[\\]|\.\.|\/[/.]|\/$|^$/u.test(revision)) refuse("names no revision");
  if (path !== "" && !isInside(path)) refuse("names no file of the repository");
  return { repository, revision, path };
}

/**
 * Tells if a path stays below where it begins. Names of a repository become paths on this disk and in addresses, where
 * half a character has no spelling: its owner chooses them.
 */
export function isInside(path: string): boolean {
  return path.split("/").every((part) => !/^\.{0,2}$|[\\\0\p{Cs}]|^[a-z]:/iu.test(part));
}

/** A part of an address without its escapes, or as it is where they are none. */
export function decoded(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}
