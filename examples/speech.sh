#!/usr/bin/env bash
# Speaks with curl: a file, and a stream of raw samples.
#
#   ./speech.sh [http://localhost:8778]
set -euo pipefail
server="${1:-http://localhost:8778}"

curl --fail-with-body --silent --show-error "$server/v1/audio/voices"
echo

curl --fail-with-body --silent --show-error "$server/v1/audio/speech" \
    -H "Content-Type: application/json" \
    -d '{"input": "Hallo, dies ist ein Test.", "voice": "de_man", "seed": 42}' \
    --output speech.mp3
echo "speech.mp3"

# 16-bit mono samples as they are made; a player would take the place of "cat":
#   ffplay -f s16le -ar 24000 -ch_layout mono -
curl --fail-with-body --silent --show-error --no-buffer "$server/v1/audio/speech" \
    -H "Content-Type: application/json" \
    -d '{"input": "Good morning.", "voice": "en_woman", "response_format": "pcm"}' |
    cat >speech.pcm
echo "speech.pcm"
