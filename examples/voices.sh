#!/usr/bin/env bash
# Uploads a clip as a voice with curl, speaks with it, and deletes it again.
#
#   ./voices.sh CLIP "What the clip says." [http://localhost:8778]
set -euo pipefail
clip="$1"
transcript="$2"
server="${3:-http://localhost:8778}"
name="my_voice"

curl --fail-with-body --silent --show-error "$server/v1/audio/voices" \
    -F "name=$name" -F "audio_sample=@$clip" -F "transcript=$transcript" \
    -F "consent=The speaker agreed on 2026-03-01."
echo

curl --fail-with-body --silent --show-error "$server/v1/audio/speech" \
    -H "Content-Type: application/json" \
    -d "{\"input\": \"Good morning.\", \"voice\": \"$name\"}" \
    --output voice.mp3
echo "voice.mp3"

curl --fail-with-body --silent --show-error -X DELETE "$server/v1/audio/voices/$name"
echo
