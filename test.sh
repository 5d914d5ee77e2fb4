#!/usr/bin/env bash
# Everything that CI checks: sets up, then lint, types and tests. Arguments go to pytest.
#
#   ./test.sh                       all
#   ./test.sh tests/audio -x        some
#
#   VENV, PYTHON   see scripts/install
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# The environment takes 2.5 GB, and what tests write comes on top. A full disk fails in odd places.
free_mb="$(df -Pm . "${TMPDIR:-/tmp}" | awk 'NR > 1 { print $4 }' | sort -n | head -n 1)"
[ "$free_mb" -ge 4000 ] || echo "Only $free_mb MB of disk are free; set-up and tests want 4000." >&2

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
