/**
 * Links that carry a task: the file itself stands in the fragment, which browsers do not send to the server.
 */

/** Most bytes of a file in a link: programs that people send links with cut longer ones. */
const MOST_BYTES = 2000;
const CARRIES = "#take=";

/**
 * @param {string} id
 * @param {Uint8Array} file of the task
 * @returns {string | undefined} nothing for a file that is too large for a link
 */
export function linkTo(id, file) {
  if (file.length > MOST_BYTES) return undefined;
  const text = btoa(String.fromCharCode(...file))
    .replaceAll("+", "-")
    .replaceAll("/", "_")
    .replace(/=+$/, "");
  return `${location.href.replace(/#.*/, "")}${CARRIES}${encodeURIComponent(id)}/${text}`;
}

/**
 * The task that a link carries, as a task file, not checked yet.
 * @param {string} hash
 * @returns {File | undefined} nothing where the link carries none
 */
export function taskOf(hash) {
  if (!hash.startsWith(CARRIES)) return undefined;
  const [name = "", text = ""] = hash.slice(CARRIES.length).split("/");
  const id = nameIn(`#${name}`) || "task";
  try {
    const bytes = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (one) => one.charCodeAt(0));
    return new File([bytes], `${id}.eigentask`);
  } catch {
    // A link that was cut or changed is an empty file: what reads it says what is wrong.
    return new File([], `${id}.eigentask`);
  }
}

/**
 * The task that an address names.
 * @param {string} hash
 */
export function nameIn(hash) {
  try {
    return decodeURIComponent(hash.slice(1));
  } catch {
    return "";
  }
}
