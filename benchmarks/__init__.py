"""Programs that measure: run one with ``scripts/bench NAME`` or ``python -m benchmarks.NAME``."""
