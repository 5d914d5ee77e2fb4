#!/usr/bin/env bash
# Writes a CSV line per GPU every 2 seconds until it is stopped; starts the file anew.
#
#   scripts/monitor_gpu.sh [FILE]      default gpu_monitor.log
#
# Columns: timestamp, gpu_name, memory_used_mb, memory_total_mb, gpu_util_pct, mem_util_pct, temp_c
set -euo pipefail
log="${1:-gpu_monitor.log}"
query=timestamp,name,memory.used,memory.total,utilization.gpu,utilization.memory,temperature.gpu

fail() {
    echo "monitor_gpu.sh: $1" >&2
    exit 1
}

command -v nvidia-smi >/dev/null || fail "no GPU to watch: nvidia-smi is not installed here"
# What nvidia-smi has to say goes to standard output, errors included.
lines() {
    nvidia-smi --query-gpu="$query" --format=csv,noheader,nounits 2>&1
}
first="$(lines)" || fail "no GPU to watch: $first"

echo timestamp,gpu_name,memory_used_mb,memory_total_mb,gpu_util_pct,mem_util_pct,temp_c >"$log"
echo "writing to $log every 2 s; stop with Ctrl-C"
while now="$(lines)" || fail "the GPU is gone: $now"; do
    echo "${now//, /,}" >>"$log"
    sleep 2
done
