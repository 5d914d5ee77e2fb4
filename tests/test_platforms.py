"""What the package knows of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vllm.exceptions import ConfigError
from vllm.platforms import (
    Platform,
    activation_dtype,
    check_dependent_launch,
    is_lost,
    num_cores,
    resolve_kv_dtype,
    use_float32_convolutions,
)

needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")


def describe_cpus(folder: Path, siblings: dict[int, str]) -> None:
    for cpu, text in siblings.items():
        path = folder / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        path.parent.mkdir(parents=True)
        path.write_text(f"{text}\n")


@needs_affinity
def test_threads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe_cpus(tmp_path, {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 4, 5})
    assert num_cores(tmp_path) == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 4})
    assert num_cores(tmp_path) == 1


@needs_affinity
def test_where_nothing_is_said_every_processor_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert num_cores(tmp_path) == 3


def test_this_machine_has_cores() -> None:
    assert 1 <= num_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("auto", torch.float32, torch.float32),
        ("auto", torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("float32", torch.bfloat16, torch.float32),
    ],
)
def test_pages_have_the_type_of_the_weights_unless_asked(
    name: str, weights: torch.dtype, expected: torch.dtype
) -> None:
    cpu = Platform(torch.device("cpu"))
    assert resolve_kv_dtype(name, weights, cpu) == expected


def test_on_cuda_pages_have_the_type_of_the_weights() -> None:
    cuda = Platform(torch.device("cuda"))
    assert resolve_kv_dtype("bfloat16", torch.bfloat16, cuda) == torch.bfloat16
    with pytest.raises(ConfigError, match="choose the former with --dtype"):
        resolve_kv_dtype("float32", torch.bfloat16, cuda)


def test_fp8_pages_need_a_card_that_has_such_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="needs CUDA"):
        resolve_kv_dtype("fp8", torch.float32, Platform(torch.device("cpu")))
    cuda = Platform(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"this card has 8\.0"):
        resolve_kv_dtype("fp8", torch.bfloat16, cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve_kv_dtype("fp8", torch.bfloat16, cuda) == torch.float8_e4m3fn


def test_activations_beside_bfloat16_are_wide_on_a_cpu_only() -> None:
    assert activation_dtype(torch.bfloat16, torch.device("cpu")) == torch.float32
    assert activation_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    assert activation_dtype(torch.float16, torch.device("cpu")) == torch.float16


def test_convolutions_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    use_float32_convolutions()
    assert not torch.backends.cudnn.allow_tf32


def test_a_device_is_lost_when_waiting_for_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not is_lost(card)

    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert is_lost(card)
    assert not is_lost(torch.device("cpu"))


def test_dependent_launch_needs_a_card_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    host, card = Platform(torch.device("cpu")), Platform(torch.device("cuda"))
    check_dependent_launch("off", host)
    with pytest.raises(ConfigError, match="the CPU has none"):
        check_dependent_launch("on", host)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(ConfigError, match=r"prefetch: .* this card has 8\.9"):
        check_dependent_launch("prefetch", card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_dependent_launch("prefetch", card)
