#!/usr/bin/env bash
# Sets up the environment when needed, then starts the speech server on 0.0.0.0:8778.
# Arguments go to the server; a repeated flag wins over the ones given here.
#
#   ./run.sh
#   ./run.sh --port 9000 --model DIR --audio-tokenizer-type DIR
#
#   PORT                     port to bind; default 8778
#   GPU_MEMORY_UTILIZATION   share of the card's memory; default: the server's
#   MAX_MODEL_LEN            positions of one request; default: the server's
#   VENV, PYTHON             see scripts/install
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
flags=(--host 0.0.0.0 --port "${PORT:-8778}")
[ -z "${GPU_MEMORY_UTILIZATION:-}" ] || flags+=(--gpu-memory-utilization "$GPU_MEMORY_UTILIZATION")
[ -z "${MAX_MODEL_LEN:-}" ] || flags+=(--max-model-len "$MAX_MODEL_LEN")
"$root/scripts/install"
exec "$root/scripts/in-venv" python -m vllm.entrypoints.bosonai.api_server "${flags[@]}" "$@"
