/**
 * Keeps the page for offline use: registers its service worker, and has it check on each visit that everything is
 * there. sw.js decides which files are kept, and how.
 */

/**
 * Call it once the page has loaded what it needs itself.
 * @returns {Promise<string>} how that went, as a sentence
 */
export async function keepOffline() {
  const { serviceWorker } = navigator;
  if (!serviceWorker) return "Not kept for offline use: browsers allow that over HTTPS only.";
  try {
    const registration = await serviceWorker.register("sw.js");
    // A worker that is there already is looked up only, not compared with the server's. Offline it stays.
    await registration.update().catch(() => {});
    const { installing } = registration;
    if (installing) await reached(installing, ["activated", "redundant"]);
    const reason = await missing(registration);
    if (reason !== undefined) throw new Error(reason);
    return "Kept in this browser: works offline from now on, teaching too.";
  } catch (error) {
    return `Not kept for offline use: ${/** @type {Error} */ (error).message}.`;
  }
}

/** Milliseconds that the worker of another build has to take over. */
const TAKEOVER = 10_000;

/**
 * Asks the worker in charge. The worker of another build may take over meanwhile, and then that one is asked.
 * @param {ServiceWorkerRegistration} registration
 * @returns {Promise<string | undefined>} what is missing and why
 */
async function missing(registration) {
  for (;;) {
    const { active } = registration;
    if (!active) return "a file on the server is not the one that was built";
    const replaced = reached(active, ["redundant"]);
    const reason = await Promise.race([check(active), replaced]);
    const coming = registration.installing ?? registration.waiting;
    if (reason !== undefined && coming)
      await Promise.race([replaced, new Promise((resolve) => setTimeout(resolve, TAKEOVER))]);
    if (active.state !== "redundant") return reason;
    // The registration names its new worker a moment later.
    while (registration.active === active) await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

/**
 * @param {ServiceWorker} worker
 * @param {readonly ServiceWorkerState[]} states
 * @returns {Promise<undefined>} when it is in one of them
 */
function reached(worker, states) {
  return new Promise((resolve) => {
    const look = () => states.includes(worker.state) && resolve(undefined);
    worker.addEventListener("statechange", look);
    look();
  });
}

/**
 * @param {ServiceWorker} worker
 * @returns {Promise<string | undefined>} what is missing and why
 */
function check(worker) {
  const { port1, port2 } = new MessageChannel();
  return new Promise((resolve) => {
    port1.onmessage = ({ data }) => resolve(data);
    worker.postMessage("check", [port2]);
  });
}
