"""``python -m vllm.entrypoints.cli`` is the ``vllm`` command."""

from __future__ import annotations

import sys

from vllm.entrypoints.cli import main

if __name__ == "__main__":
    sys.exit(main())
