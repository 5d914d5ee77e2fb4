"""Files found, preferred and refused; strict loading that names every misfit."""

import json

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save_file

from vllm.exceptions import CheckpointError
from vllm.model_executor.weights import iter_tensors, load_strict, resolve, select_files


def test_single_safetensors_is_preferred_to_indexed_shards(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"b": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [name for name, _ in iter_tensors(tmp_path)] == ["a"]
    (tmp_path / "model.safetensors").unlink()
    assert [name for name, _ in iter_tensors(tmp_path)] == ["b"]


def test_missing_shard_is_named(tmp_path):
    index = {"weight_map": {"b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        list(iter_tensors(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_plain_tensors_load(tmp_path, name, zipped):
    torch.save({"a": torch.arange(3)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert {key: value.tolist() for key, value in iter_tensors(tmp_path)} == {"a": [0, 1, 2]}


def test_pickle_with_code_is_refused(tmp_path):
    torch.save({"a": print}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"model\.pth"):
        list(iter_tensors(tmp_path))


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_damaged_file_is_an_error_of_ours(tmp_path, name):
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(CheckpointError, match=name):
        list(iter_tensors(tmp_path))


def test_strict_loading_names_every_misfit_at_once():
    targets = {name: torch.zeros(2) for name in ("fits", "absent", "misshapen")}
    tensors = {"fits": torch.ones(2), "misshapen": torch.ones(3), "surplus": torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        load_strict(targets, tensors.items(), source="here")
    message = str(caught.value)
    assert message.startswith("here ")
    assert "missing: absent [2]" in message
    assert "wrong shape: misshapen is [3], expected [2]" in message
    assert "unexpected: surplus [1]" in message
    assert "fits [" not in message


def test_strict_loading_fills_views_renames_and_skips():
    packed = torch.zeros(4)
    targets = {"q": packed[:1], "k": packed[1:3], "extra": packed[3:]}
    tensors = {"old_q": torch.ones(1), "old_k": torch.tensor([2.0, 3.0]), "old_junk": torch.ones(9)}
    names = {"old_q": "q", "old_k": "k"}
    load_strict(targets, tensors.items(), source="x", rename=names.get, optional={"extra"})
    assert packed.tolist() == [1, 2, 3, 0]


def test_a_tensor_given_twice_is_an_error():
    tensors = [("a", torch.ones(1)), ("a", torch.ones(1))]
    with pytest.raises(CheckpointError, match="twice: a"):
        load_strict({"a": torch.zeros(1)}, tensors, source="x")


def test_resolve_keeps_a_folder_and_refuses_nonsense(tmp_path):
    assert resolve(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match="neither an existing folder nor a Hub id"):
        resolve("/no/such/folder")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(tmp_path / "file")


def test_resolve_offline_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        resolve("owner/name", download_dir=tmp_path)


class FakeHub:
    """Stands in for the client of the Hub: what it is asked for, and how it answers."""

    def __init__(self, monkeypatch, answer):
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: self)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)
        self._answer = answer
        self.calls = []

    def list_repo_files(self, repo_id, *, revision):
        if isinstance(self._answer, Exception):
            raise self._answer
        return ["config.json", "model.safetensors", "pytorch_model.bin"]

    def download(self, repo_id, **options):
        self.calls.append(options)
        return f"/cache/{repo_id}"


def test_a_hub_id_is_downloaded(monkeypatch, tmp_path):
    hub = FakeHub(monkeypatch, "yes")
    assert str(resolve("owner/name", revision="v1", download_dir=tmp_path)) == "/cache/owner/name"
    files = ["config.json", "model.safetensors"]
    assert hub.calls == [{"revision": "v1", "cache_dir": tmp_path, "allow_patterns": files}]


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (GatedRepoError, "asks for permission"),
        (RevisionNotFoundError, "no revision 'v1'"),
        (RepositoryNotFoundError, "neither a local folder nor a repository"),
    ],
)
def test_what_the_hub_refuses_is_not_looked_for_in_the_cache(monkeypatch, refusal, message):
    hub = FakeHub(monkeypatch, refusal.__new__(refusal))  # made of a reply, which there is none of
    with pytest.raises(CheckpointError, match=message):
        resolve("owner/name", revision="v1")
    assert hub.calls == []


def test_without_a_network_the_cache_is_used(monkeypatch):
    hub = FakeHub(monkeypatch, ConnectionError("no route"))
    assert str(resolve("owner/name")) == "/cache/owner/name"
    assert [call["local_files_only"] for call in hub.calls] == [True]


def test_download_takes_one_copy_of_the_weights():
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    rest = ["config.json", "README.md", "pytorch_model.bin", "sub/model.safetensors"]
    assert select_files([*rest, *shards]) == ["config.json", *shards]
    assert select_files([*rest, *shards, "model.safetensors"]) == [
        "config.json",
        "model.safetensors",
    ]
    assert select_files(["config.json", "model.pth"]) == ["config.json", "model.pth"]
