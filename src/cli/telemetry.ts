/**
 * Switches onnxruntime's telemetry off, unless the environment says something else. Since 1.29 its native builds keep a device id and
 * events in the user's cache folder and upload them (onnxruntime's pull requests 27379 and 29843).
 *
 * Imported for its effect, before a session is made: onnxruntime-node looks at the variable with the first one, and then never again.
 * Processes that are started later inherit it, and a Python among them looks when it imports onnxruntime.
 */
process.env["ORT_DISABLE_TELEMETRY"] ??= "1";
