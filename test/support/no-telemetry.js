/**
 * Switches onnxruntime's telemetry off in scripts that tap does not start. Imported before onnxruntime, for its effect.
 */
process.env["ORT_DISABLE_TELEMETRY"] ??= "1";
