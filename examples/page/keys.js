/**
 * Keys that pick a task, on both pages: Escape leaves a field, arrows go to the neighbours, a number or the first
 * letters of a name go there at once.
 */

/** Longest pause in milliseconds between two keys of one name or number. */
const TYPE_AHEAD = 700;
/** Keys of names and numbers. */
const TYPED = /^[a-z0-9:+-]$/i;

/**
 * Letters and numbers work on the cards, and anywhere but in a field while `everywhere` is checked: people who speak to
 * their browser want to turn that off (WCAG 2.1.4).
 * @param {object} page
 * @param {HTMLElement} page.cards holds a radio button for each task
 * @param {HTMLInputElement} page.everywhere
 * @param {() => readonly string[]} page.ids in the order of their numbers
 * @param {() => string} page.active "" before there is one
 * @param {(id: string) => readonly string[]} page.namesOf that one may type, the likeliest first
 * @param {(id: string) => void} page.pick
 */
export function pickByKeys({ cards, everywhere, ids, active, namesOf, pick }) {
  let typed = "";
  let typedAt = 0;

  /** @param {string | undefined} id */
  const go = (id) => {
    if (id === undefined) return;
    /** @type {HTMLInputElement} */ (cards.querySelector(`[value="${CSS.escape(id)}"]`)).focus();
    if (id !== active()) pick(id);
  };

  /** @param {string} key @param {number} now */
  const typedTo = (key, now) => {
    typed = now - typedAt < TYPE_AHEAD ? typed + key.toLowerCase() : key.toLowerCase();
    typedAt = now;
    const all = ids();
    const begins = (/** @type {number} */ nth) => all.find((id) => namesOf(id)[nth]?.startsWith(typed));
    return all[Number(typed) - 1] ?? begins(0) ?? begins(1);
  };

  document.addEventListener("keydown", (event) => {
    const { key, ctrlKey, metaKey, altKey, timeStamp } = event;
    const at = /** @type {Element} */ (event.target);
    if (ctrlKey || metaKey || altKey || event.defaultPrevented || active() === "") return;
    // Any other key ends a name or number.
    if (!TYPED.test(key)) typed = "";
    if (key === "Escape") return go(active());
    const onCards = cards.contains(at);
    if (!onCards && (at.matches("input, textarea") || !everywhere.checked)) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[key];
    // Radio buttons know arrows themselves.
    if (step !== undefined && !onCards) {
      const all = ids();
      go(all[(all.indexOf(active()) + step + all.length) % all.length]);
    }
    if (TYPED.test(key)) go(typedTo(key, timeStamp));
  });
}
