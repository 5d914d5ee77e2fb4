from __future__ import annotations

import subprocess
import sys

import pytest

from vllm.audio import FORMATS, lookup
from vllm.exceptions import InvalidRequestError


def test_media_types():
    assert {name: fmt.media_type for name, fmt in FORMATS.items()} == {
        "mp3": "audio/mpeg",
        "opus": "audio/opus",
        "aac": "audio/aac",
        "flac": "audio/flac",
        "wav": "audio/wav",
        "pcm": "audio/pcm",
    }


@pytest.mark.parametrize("name", ["ogg", "MP3", ""])
def test_unknown_format_is_refused_by_name(name):
    with pytest.raises(InvalidRequestError, match="mp3, opus, aac, flac, wav, pcm") as error:
        lookup(name)
    assert repr(name) in str(error.value)
    assert error.value.param == "response_format"


def test_package_loads_neither_av_nor_soxr_nor_torch():
    code = "import sys, vllm.audio; print({'av', 'soxr', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
