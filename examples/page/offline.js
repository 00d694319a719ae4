/**
 * Keeps the page for offline use: registers its service worker, and has it check on each visit that everything is there.
 * What is kept, and how, is sw.js's.
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
    if (installing) await settled(installing);
    const { active } = registration;
    if (!active) throw new Error("a file on the server is not the one that was built");
    const reason = await check(active);
    if (reason !== undefined) throw new Error(reason);
    return "Kept in this browser: works offline from now on, teaching too.";
  } catch (error) {
    return `Not kept for offline use: ${/** @type {Error} */ (error).message}.`;
  }
}

/**
 * @param {ServiceWorker} worker
 * @returns {Promise<void>} when it is in charge, or has failed
 */
function settled(worker) {
  return new Promise((resolve) => {
    const look = () => void (["activated", "redundant"].includes(worker.state) && resolve());
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
