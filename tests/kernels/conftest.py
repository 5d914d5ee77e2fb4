"""Leaves out the tests of Triton kernels where there is no Triton."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = ["triton"] if find_spec("triton") is None else []
