"""What the tests of the embedded model share: an engine, a server, takes and one recogniser.

The model is a toy with a high word error rate, so tests compare what is heard of one take with what
is heard of another, or of the codec's round trip of the teacher, which is clear.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from benchmarks._judges import ClosedVocabularyRecogniser, Samples
from benchmarks.speech_quality import (
    Take,
    grammar_sentences,
    read_sentences,
    round_trips,
    speak,
    word_error_rate,
)
from vllm.checkpoints.embedded import embedded_checkpoint
from vllm.entrypoints.llm import LLM
from vllm.model_executor.codecs import load_codec

NUM_SENTENCES = 20
READY_LIMIT_S = 200  # bounds a hang

Hear = Callable[[Samples, int], list[str]]
ErrorRate = Callable[[Sequence[Take]], float]


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    engine = LLM(device="cpu", max_model_len=1024)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="session")
def takes(llm: LLM) -> list[Take]:
    """Held-out sentences as the model speaks them."""
    return speak(llm, read_sentences()[:NUM_SENTENCES], [0])


@pytest.fixture(scope="session")
def clear_takes() -> list[Take]:
    """The same as the codec makes them from the teacher's codes."""
    codec = load_codec(embedded_checkpoint() / "codec", device="cpu")
    return round_trips(codec, read_sentences()[:NUM_SENTENCES])


@pytest.fixture(scope="session")
def hear() -> Hear:
    """What the recogniser of the closed vocabulary hears; it is asked once for each sound."""
    recogniser = ClosedVocabularyRecogniser(grammar_sentences()[:4000])
    known: dict[bytes, list[str]] = {}

    def heard(samples: Samples, sample_rate: int) -> list[str]:
        key = samples.tobytes()
        if key not in known:
            known[key] = recogniser(samples, sample_rate)
        return known[key]

    return heard


@pytest.fixture(scope="session")
def error_rate(hear: Hear) -> ErrorRate:
    """Word error rate of takes against their sentences."""

    def rate(takes: Sequence[Take]) -> float:
        heard = [hear(take.samples, take.sample_rate) for take in takes]
        return word_error_rate([take.sentence.text for take in takes], heard)

    return rate


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server that was started as ``./run.sh`` does, with the embedded model."""
    folder = tmp_path_factory.mktemp("server")
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.bosonai.api_server"),
                *("--device", "cpu", "--host", "127.0.0.1", "--port", "0"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CACHE_ROOT": str(folder / "cache")},
        )
    try:
        url = _url_when_ready(server, folder / "log")
        with httpx.Client(base_url=url, timeout=READY_LIMIT_S) as client:
            yield client
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _url_when_ready(server: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + READY_LIMIT_S
    while time.monotonic() < deadline and server.poll() is None:
        found = re.search(r"listening on \S+:(\d+)", log.read_text())
        if found and _is_healthy(f"http://127.0.0.1:{found[1]}"):
            return f"http://127.0.0.1:{found[1]}"
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False  # bound, not yet accepting
