#!/usr/bin/env bash
# Sets up the environment when needed, then starts the speech server on 0.0.0.0:8778.
# Arguments go to the server; a repeated flag wins over the ones given here.
#
#   ./run.sh
#   ./run.sh --port 9000 --model DIR --audio-tokenizer-type DIR
#
#   VENV, PYTHON   see scripts/install
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
"$root/scripts/install"
exec "$root/scripts/in-venv" python -m vllm.entrypoints.bosonai.api_server \
    --host 0.0.0.0 --port 8778 "$@"
