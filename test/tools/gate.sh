#!/usr/bin/env bash
# The gate: the demo, what README's check does, and all tests, with the tools that are here (test/support/required.ts). `.ci/run` installs them.
set -euo pipefail
cd "$(dirname "$0")/../.."

# Types take as long as the rest: two at a time, as the files of tests.
npm run types &
types=$!
npm run lint
npm run package
node examples/demo.js
wait "$types"

# README's test command where nothing but Node is within reach; then, with all tools, the files in which a test was skipped. The others ask
# for no tool, and would only repeat themselves. Of these files, a test that passed is not run once more.
tests() {
  local failed=0 again passed=.tap/passed
  rm -rf .tap/test-results "$passed"
  EIGENLORA_BARE=1 EIGENLORA_REQUIRE="" npm test || failed=1
  cp -r .tap/test-results "$passed"
  again=$(grep -arlE '^ *ok .*[^\\]# SKIP' "$passed" | sed -E 's,^\.tap/passed/(.*)\.tap$,\1,')
  # And those that take fewer runtimes in `npm test`.
  again=$(printf '%s\n' "$again" $(git grep -lE '\b(ORTS|RUNTIMES)\b|\bwhole \} from' -- test/unit test/models) | sort -u)
  # shellcheck disable=SC2086 # a list
  EIGENLORA_PASSED=$passed npx tap --jobs="$(($(nproc) > 2 ? $(nproc) : 2))" $again "test/{browsers,runtimes,pages}/*.test.ts" || failed=1
  return "$failed"
}
# Failures once more at the end, where a log that is cut still has them, and the sums of both runs.
log=$(mktemp) failed=0
tests 2>&1 | tee "$log" || failed=1
if [ "$failed" = 1 ]; then
  echo "Failures, of $log:"
  grep -a -E -B1 -A24 "^ *not ok" "$log" | head -n 160 || true
fi
awk '/^# { total:/ { for (i = 3; i < NF; i++) sum[$i] += $(i + 1) } END { print sum["pass:"] + 0 " passed, " sum["fail:"] + 0 " failed" }' "$log"
exit "$failed"
