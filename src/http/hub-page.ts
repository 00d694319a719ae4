/**
 * Names of the Hugging Face Hub as people have them: `hf:org/name@revision/folder`, or the address of a page.
 */
import { decoded, type HubName, hubEndpoint, parsed } from "./hub-name.ts";

/** Hosts whose pages show repositories. */
const PAGES = /^https?:\/\/(?:www\.)?(?:huggingface\.co|hf\.co)(?=\/)/i;
/** Views of a repository in addresses of pages, in front of revision and path. */
const SHOWN = /^(blob|tree|resolve|raw|blame)$/;

/**
 * Reads a name by its form: nothing is asked.
 * @returns undefined for what is no name of the Hub, such as a path
 * @throws TypeError for one that is not well formed
 */
export function hubName(text: string): HubName | undefined {
  const body = /^hf:/i.test(text) ? text : bodyOfPage(text);
  return body === undefined ? undefined : parsed(body, text);
}

/** Writes a name in its short form. */
export function hubText({ repository, revision, path }: HubName): string {
  const at = revision === "main" ? "" : `@${/^refs\/(pr|convert)\//.test(revision) ? revision : encoded(revision)}`;
  return `hf:${repository}${at}${path && `/${path}`}`;
}

/** The part after `hf:` of the name that an address of a page stands for. */
function bodyOfPage(text: string): string | undefined {
  const endpoint = hubEndpoint();
  const rest = text.startsWith(`${endpoint}/`) ? text.slice(endpoint.length) : text.replace(PAGES, "");
  if (rest === text) return undefined;
  const parts = rest
    .replace(/[?#].*$/, "")
    .split("/")
    .filter(Boolean)
    .map(decoded);
  const [org, name, shown, revision, ...path] = parts;
  if (revision === undefined || !SHOWN.test(shown!)) return parts.join("/");
  return [`${org}/${name}@${encoded(revision)}`, ...path].join("/");
}

const encoded = (part: string): string => part.replaceAll("%", "%25").replaceAll("/", "%2F");
