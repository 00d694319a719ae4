// The page: it asks the worker, and shows the answer to what is asked last.
const field = /** @type {HTMLInputElement} */ (document.getElementById("text"));
const list = /** @type {HTMLSelectElement} */ (document.getElementById("task"));
const output = /** @type {HTMLOutputElement} */ (document.getElementById("answer"));

const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
const ask = () => worker.postMessage({ task: list.value, text: field.value });
list.onchange = ask;
field.onchange = ask;

worker.onmessage = (/** @type {MessageEvent} */ { data: { loading, tasks, task, text, label, error } }) => {
  if (loading) output.value = `Loading ${loading}`;
  if (error) output.value = error;
  for (const id of tasks ?? []) list.add(new Option(id));
  if (tasks) ask();
  if (task === list.value && text === field.value) output.value = label;
};
worker.onerror = (/** @type {ErrorEvent} */ { message }) => (output.value = message || "worker.js cannot be loaded");
