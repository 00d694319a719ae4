/** Expected refusals and their causes. Any other refusal is an error; so is an expected one that does not occur. */

/** @typedef {{ families?: string[], exporters?: string[], formats?: string[], modes: string[], message: RegExp, cause: string }} Refusal */

/** @type {readonly Refusal[]} `modes` has "rows" for one task a row */
export const REFUSALS = [
  {
    formats: ["q4", "int8"],
    modes: ["folded"],
    message: /quantised/,
    cause: "quantised weights cannot be written into",
  },
  {
    families: ["deberta-v2"],
    modes: ["rows"],
    message: /runs on one task and not on several: the batch is not the first dimension of some adapted layer/,
    cause: "its query and key layers are applied to the table of relative positions too, which all rows share",
  },
  {
    families: ["swin"],
    modes: ["rows"],
    message: /runs on one task and not on several: the batch is not the first dimension of some adapted layer/,
    cause: "its layers see windows of pictures, several for each row",
  },
];

/** Refusals that have occurred. @type {Set<Refusal>} */
const met = new Set();

/**
 * The cause of a refusal that is expected.
 * @param {{ name: string }} family @param {{ exporter: string, format: string }} made @param {string} mode @param {string} message
 * @returns {string | undefined}
 */
export function refusalOf({ name }, { exporter, format }, mode, message) {
  const found = REFUSALS.find(
    (one) =>
      (one.families?.includes(name) ?? true) &&
      (one.exporters?.includes(exporter) ?? true) &&
      (one.formats?.includes(format) ?? true) &&
      one.modes.includes(mode) &&
      one.message.test(message),
  );
  if (found) met.add(found);
  return found?.cause;
}

/** Refusals of the list that have not occurred. */
export function unmet() {
  return REFUSALS.filter((one) => !met.has(one)).map(
    (one) => `refusals.js: ${one.cause}: nothing was refused for this`,
  );
}
