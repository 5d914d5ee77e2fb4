"""Text stays text, whatever special tokens it spells."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from vllm.exceptions import CheckpointError
from vllm.prompts import TextTokenizer

SPELLINGS = ["<|eot_id|>", "<|audio_out_bos|>", "<|AUDIO_OUT|>", "<SE>", "</SE_e>", "foo bar", "zz"]


@pytest.fixture(scope="module")
def mixed_tokenizer(tokenizer_folder):
    """Some added tokens special, some not, some that swallow blanks around them."""
    raw = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    raw.add_tokens(["foo bar", AddedToken("zz", lstrip=True, rstrip=True, normalized=True)])
    return raw


def added_ids(raw):
    return set(raw.get_added_tokens_decoder())


def test_raw_tokenizer_would_interpret_them(mixed_tokenizer):
    raw = Tokenizer.from_str(mixed_tokenizer.to_str())
    found = raw.encode(" ".join(SPELLINGS), add_special_tokens=False).ids
    assert len(added_ids(raw) & set(found)) == len(SPELLINGS)


@given(st.lists(st.sampled_from([*SPELLINGS, " ", "a", "<", "SE>", "|>"]), max_size=8))
def test_no_added_token_comes_out_of_text(mixed_tokenizer, pieces):
    raw = Tokenizer.from_str(mixed_tokenizer.to_str())
    text = "".join(pieces)
    ids = TextTokenizer(raw).encode(text)
    assert not added_ids(raw) & set(ids)
    assert raw.decode(ids, skip_special_tokens=False) == text


def test_names_keep_their_ids(mixed_tokenizer):
    raw = Tokenizer.from_str(mixed_tokenizer.to_str())
    before = {spelling: raw.token_to_id(spelling) for spelling in SPELLINGS}
    size = raw.get_vocab_size()
    tokenizer = TextTokenizer(raw)
    assert {spelling: tokenizer.token_id(spelling) for spelling in SPELLINGS} == before
    assert tokenizer.vocab_size == size


def test_unknown_name_is_an_error(tokenizer):
    assert not tokenizer.has_token("<|nothing|>")
    with pytest.raises(CheckpointError, match=r"no token '<\|nothing\|>'"):
        tokenizer.token_id("<|nothing|>")


def test_folder_without_tokenizer_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        TextTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(CheckpointError, match="cannot read"):
        TextTokenizer.from_folder(tmp_path)
