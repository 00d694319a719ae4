export default {
  build: {
    rolldownOptions: {
      // One file for what several parts of the app share, instead of one for each combination of parts.
      output: { codeSplitting: { groups: [{ name: "shared", minShareCount: 2 }] } },
      checks: { ineffectiveDynamicImport: false },
    },
  },
};
