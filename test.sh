#!/usr/bin/env bash
# Everything that CI checks: sets up, then lint, types and tests. Arguments go to pytest.
#
#   ./test.sh                       all
#   ./test.sh tests/audio -x        some
#
#   VENV, PYTHON   see scripts/install
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

scripts/install test dev
# The tests of file formats use ffmpeg and ffprobe, those of pages and clients use node.
missing="$(scripts/install-tools)"

failed=()
scripts/check || failed+=("scripts/check (lint, format or types)")
if command -v cmake >/dev/null && command -v c++ >/dev/null; then
    scripts/check-native none || failed+=("scripts/check-native")
fi
scripts/test "$@" || failed+=("scripts/test")

if [ -n "$missing" ]; then
    echo "Not found and not installable here: $missing; the tests that need them were skipped."
fi
for step in "${failed[@]}"; do
    echo "failed: $step"
done
[ ${#failed[@]} -eq 0 ]
