"""Finds checkpoint files and streams their tensors into parameters, strictly.

Knows files, names and shapes; which parameter a name belongs to is the model's to say.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from fnmatch import fnmatch
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm import envs
from vllm.checkpoint_config import read_config
from vllm.exceptions import CheckpointError
from vllm.kernels.quantize import QuantizedWeight, WeightFormat
from vllm.logger import get_logger

__all__ = [
    "QUANTIZED_SCALE",
    "dequantized",
    "iter_tensors",
    "load_strict",
    "read_config",
    "resolve",
    "saved_quantization",
    "select_files",
]

logger = get_logger(__name__)

# A quantised matrix is two tensors: "NAME" of int8, or uint8 where two int4 share a byte, and this.
QUANTIZED_SCALE = "_scale"

_SINGLE_SAFETENSORS = "model.safetensors"
_QUANTIZED_FORMATS = {torch.int8: "int8", torch.uint8: "int4"}
_SAFETENSORS_INDEX = "model.safetensors.index.json"
_SHARD_PATTERN = "model-*-of-*.safetensors"
_PICKLES = ("pytorch_model.bin", "model.pth")
_PICKLE_INDEX = "pytorch_model.bin.index.json"
_SMALL_FILES = ("*.json", "*.jinja", "*.txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve(
    name_or_path: str | Path, *, revision: str | None = None, download_dir: Path | None = None
) -> Path:
    """Local folder of a checkpoint, downloaded from the Hub where needed.

    Args:
        name_or_path: a local folder, or a Hub id such as ``owner/name``.
        revision: branch, tag or commit on the Hub; ignored for a folder.
        download_dir: cache folder for downloads; default is the Hub client's own.

    Raises:
        CheckpointError: no such folder or repository, or offline and not in the cache.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    name = str(name_or_path)
    if folder.exists():
        raise CheckpointError(f"{name!r} is a file; give the folder that holds config.json")
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name!r} is neither an existing folder nor a Hub id (owner/name)")
    return _download(name, revision, download_dir)


def select_files(names: Iterable[str]) -> list[str]:
    """Files of a repository that a checkpoint needs: one copy of the weights, and small files.

    A single safetensors file is preferred to shards, and safetensors to pickles, as
    ``iter_tensors`` does.
    """
    top = [name for name in names if "/" not in name]
    small = [name for name in top if any(fnmatch(name, pattern) for pattern in _SMALL_FILES)]
    if _SINGLE_SAFETENSORS in top:
        return [*small, _SINGLE_SAFETENSORS]
    shards = [name for name in top if fnmatch(name, "*.safetensors")]
    pickles = [name for name in top if fnmatch(name, "*.bin") or name in _PICKLES]
    return [*small, *(shards or pickles)]


def iter_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a checkpoint with its name, one at a time, on the CPU.

    The order of preference is ``model.safetensors``, sharded safetensors, then torch pickles,
    which are read with weights-only loading.

    Raises:
        CheckpointError: no weights, a missing shard, or a file that is not what its name says.
    """
    for path in _weight_files(folder):
        yield from (_read_safetensors if path.suffix == ".safetensors" else _read_pickle)(path)


def saved_quantization(config: Mapping[str, Any], source: Path) -> str | None:
    """int8 or int4, when ``config.json`` says that ``vllm checkpoint quantize`` wrote the folder.

    Raises:
        CheckpointError: somebody else quantised it.
    """
    section = config.get("quantization_config")
    if section is None:
        return None
    method = section.get("quant_method") if isinstance(section, Mapping) else section
    if method not in _QUANTIZED_FORMATS.values():
        raise CheckpointError(
            f"{source}: weights quantised by {method!r} are not supported; "
            "take the checkpoint that they were made from, and --quantization int8 or int4"
        )
    return str(method)


def dequantized(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Put quantised matrices and their scales together, as float32; pass on all others.

    A part whose other part never comes is passed on under its own name.
    """
    waiting: dict[str, tuple[str, Tensor]] = {}  # name of the matrix -> the part that came first
    for name, tensor in tensors:
        is_values = tensor.dtype in _QUANTIZED_FORMATS
        if not is_values and not name.endswith(f".weight{QUANTIZED_SCALE}"):
            yield name, tensor
            continue
        whole = name if is_values else name.removesuffix(QUANTIZED_SCALE)
        if whole not in waiting:
            waiting[whole] = (name, tensor)
            continue
        _, other = waiting.pop(whole)
        values, scales = (tensor, other) if is_values else (other, tensor)
        weight_format = WeightFormat(_QUANTIZED_FORMATS[values.dtype])
        yield whole, QuantizedWeight(weight_format, values, scales).dequantize()
    yield from waiting.values()


def load_strict(
    targets: MutableMapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: str,
    rename: Callable[[str], str | None] | None = None,
    optional: Collection[str] = (),
    on_filled: Callable[[str], None] | None = None,
) -> None:
    """Copy a stream of tensors into the places that want them, and refuse anything else.

    Args:
        targets: name -> destination. A destination may be a view into a packed parameter, so a
            parameter can be filled by several tensors. Each is taken out when it is filled, so that
            nothing here keeps its memory.
        tensors: names and tensors as a checkpoint spells them; values are cast on copy.
        source: what to call the checkpoint in an error.
        rename: file name of a tensor -> its name in ``targets``, or None to skip the tensor.
        optional: names in ``targets`` that may stay untouched.
        on_filled: called with each name in ``targets`` that was filled.

    Raises:
        CheckpointError: one error that names every missing, surplus and misshapen tensor.
    """
    given: set[str] = set()
    problems: list[str] = []
    for spelled, tensor in tensors:
        name = spelled if rename is None else rename(spelled)
        if name is None:
            continue
        if name in given:
            problems.append(f"given twice: {spelled} (as {name})")
        elif name not in targets:
            problems.append(f"unexpected: {spelled} {list(tensor.shape)}")
        else:
            given.add(name)
            expected = _fill(targets.pop(name), tensor)
            if expected is not None:
                problems.append(
                    f"wrong shape: {spelled} is {list(tensor.shape)}, expected {list(expected)}"
                )
            elif on_filled is not None:
                on_filled(name)
    absent = sorted(targets.keys() - set(optional))
    problems += [f"missing: {name} {list(targets[name].shape)}" for name in absent]
    if problems:
        lines = "\n  ".join(problems)
        raise CheckpointError(f"{source} does not fit its configuration:\n  {lines}")


def _fill(target: Tensor, tensor: Tensor) -> torch.Size | None:
    """Copy; or, where that cannot be, the shape that was expected."""
    if target.shape != tensor.shape:
        return target.shape
    with torch.no_grad():
        target.copy_(tensor)
    return None


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE_SAFETENSORS).is_file():
        return [folder / _SINGLE_SAFETENSORS]
    for index in (folder / _SAFETENSORS_INDEX, folder / _PICKLE_INDEX):
        if index.is_file():
            return _indexed_shards(index)
    if shards := sorted(folder.glob(_SHARD_PATTERN)):
        return shards
    for name in _PICKLES:
        if (folder / name).is_file():
            return [folder / name]
    raise CheckpointError(
        f"{folder} has no weights: expected {_SINGLE_SAFETENSORS}, {_SAFETENSORS_INDEX} "
        f"with its shards, or {' or '.join(_PICKLES)}"
    )


def _indexed_shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {error!r}") from error
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(f"{index.parent} lacks the shards {', '.join(absent)}")
    return [index.parent / name for name in names]


def _read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is no mapping
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _read_pickle(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        # Only the zip format of torch can be mapped instead of read.
        content: Any = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, UnpicklingError) as error:
        raise CheckpointError(f"cannot read {path} as plain weights: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not named tensors")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor")
        yield name, tensor


def _download(repo_id: str, revision: str | None, cache_dir: Path | None) -> Path:
    if find_spec("huggingface_hub") is None:
        raise CheckpointError(
            f"{repo_id!r} is no local folder, and downloading it needs the package huggingface_hub"
        )
    if not envs.HF_HUB_OFFLINE:
        try:
            return _from_hub(repo_id, revision, cache_dir)
        except _network_errors() as error:
            logger.warning("The Hub cannot be reached (%s); trying the local cache", error)
    return _from_cache(repo_id, revision, cache_dir)


def _from_hub(repo_id: str, revision: str | None, cache_dir: Path | None) -> Path:
    """Raises CheckpointError when the Hub says no, and one of ``_network_errors`` when it is mute."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        files = select_files(HfApi().list_repo_files(repo_id, revision=revision))
        return Path(
            snapshot_download(repo_id, revision=revision, cache_dir=cache_dir, allow_patterns=files)
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id!r} asks for permission: accept its terms on the Hub and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo_id!r} has no revision {revision!r} on the Hub") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id!r} is neither a local folder nor a repository on the Hub "
            "(or it is private and HF_TOKEN is not set)"
        ) from error


def _from_cache(repo_id: str, revision: str | None, cache_dir: Path | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, cache_dir=cache_dir, local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, OSError) as error:
        why = "HF_HUB_OFFLINE is set" if envs.HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise CheckpointError(
            f"{repo_id!r} is no local folder, {why}, and the local cache does not hold "
            f"revision {revision or 'main'!r}; download it first or give a folder"
        ) from error


def _network_errors() -> tuple[type[Exception], ...]:
    """What "no connection" may look like: the Hub client has changed its HTTP library before."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    errors: list[type[Exception]] = [OSError, HfHubHTTPError, LocalEntryNotFoundError]
    for name in ("httpx", "httpx2"):
        if find_spec(name) is not None:
            errors.append(import_module(name).HTTPError)
    return tuple(errors)
