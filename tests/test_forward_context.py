"""The forward context is seen inside its block only, and refuses to nest."""

import pytest

from vllm.forward_context import get_forward_context, set_forward_context


def test_context_is_visible_inside_the_block():
    with set_forward_context("metadata", ["cache"]):
        context = get_forward_context()
    assert (context.attn_metadata, context.kv_caches) == ("metadata", ["cache"])


def test_context_refuses_to_nest_and_keeps_the_outer_one():
    with set_forward_context("outer", []):
        with pytest.raises(RuntimeError, match="do not nest"), set_forward_context("inner", []):
            pass
        assert get_forward_context().attn_metadata == "outer"


def test_context_is_cleared_by_an_error():
    with pytest.raises(KeyError), set_forward_context("metadata", []):
        raise KeyError
    with pytest.raises(RuntimeError, match="no forward context"):
        get_forward_context()
