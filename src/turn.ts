/** Lets everything else that waits in the event loop have its turn. Loaded when work takes long. */
export function turn(): Promise<void> {
  return new Promise((resolve) => {
    if (typeof MessageChannel === "undefined") {
      // Bare shells have no timers either, and nobody else who waits.
      if (typeof setTimeout === "undefined") resolve();
      else setTimeout(resolve);
      return;
    }
    // A message, since timers are slowed down: to 4 ms each, in hidden pages to a second.
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(0);
  });
}
