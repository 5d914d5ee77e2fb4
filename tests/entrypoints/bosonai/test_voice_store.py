"""The store of uploaded voices, in a folder and in a bucket: whole or not at all, shared, bounded."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from botocore.stub import Stubber

from vllm.entrypoints.bosonai.serving_voices import open_store
from vllm.entrypoints.bosonai.voice_bucket import BucketFiles
from vllm.entrypoints.bosonai.voice_store import (
    FolderFiles,
    StoredVoice,
    VoiceFiles,
    VoiceStore,
    id_of_name,
    new_id,
)
from vllm.entrypoints.bosonai.voices import VoiceLibrary
from vllm.entrypoints.server_config import ServerConfig
from vllm.exceptions import (
    ConfigError,
    InvalidRequestError,
    UnknownVoiceError,
    VoiceConflictError,
    VoiceNotFoundError,
    VoiceStoreError,
)

RATE = 24_000
CLIP = np.sin(np.arange(RATE) / 20).astype(np.float32) * 0.5
HOUR_S = 3600


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def stored(voice_id: str = "anna", **changes: Any) -> StoredVoice:
    fields = {"voice_id": voice_id, "name": "Anna", "kind": "audio_sample", "created_at": 7}
    return StoredVoice(**(fields | {"version": new_id(), "transcript": "Hello."} | changes))


def library_on(store: VoiceStore, clock: Callable[[], float] = time.monotonic) -> VoiceLibrary:
    return VoiceLibrary(
        sample_rate=RATE,
        hop_length=960,
        codec_fingerprint="none",
        num_codebooks=8,
        can_encode=True,
        store=store,
        clock=clock,
    )


@pytest.fixture(params=["folder", "bucket"])
def open_files(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], VoiceFiles]:
    """Opens the same place anew, as another server process would."""
    if request.param == "folder":
        return lambda: FolderFiles(tmp_path / "voices")
    bucket: str = request.getfixturevalue("bucket")
    return lambda: BucketFiles(bucket, "tts/voices")


@pytest.fixture
def store(open_files: Callable[[], VoiceFiles]) -> VoiceStore:
    return VoiceStore(open_files())


def keys(bucket: str) -> list[str]:
    listed = boto3.client("s3").list_objects_v2(Bucket=bucket)
    return [item["Key"] for item in listed.get("Contents", ())]


@pytest.mark.parametrize("clip", [CLIP, None])
def test_a_voice_survives_a_restart(
    open_files: Callable[[], VoiceFiles], clip: np.ndarray | None
) -> None:
    voice = stored(consent="yes", name="Änna")
    VoiceStore(open_files()).add(voice, clip, RATE)
    again = VoiceStore(open_files())
    assert again.voices() == [voice]
    assert again.get("anna") == voice
    found = again.read_clip(voice)
    if clip is None:
        assert found is None
    else:
        assert found is not None
        assert found[1] == RATE
        np.testing.assert_allclose(found[0], CLIP, atol=1e-4)


def test_the_oldest_voice_is_listed_first(store: VoiceStore) -> None:
    for voice_id, created_at in (("a", 3), ("c", 1), ("b", 1)):
        store.add(stored(voice_id, created_at=created_at), None, 0)
    assert [voice.voice_id for voice in store.voices()] == ["b", "c", "a"]
    store.delete("c")
    assert [voice.voice_id for voice in store.voices()] == ["b", "a"]


def test_a_voice_made_again_is_listed_anew(store: VoiceStore) -> None:
    store.add(stored(name="First"), CLIP, RATE)
    assert [voice.name for voice in store.voices()] == ["First"]
    store.delete("anna")
    store.add(stored(name="Second"), CLIP, RATE)
    assert [voice.name for voice in store.voices()] == ["Second"]


def test_every_library_sees_changes_within_the_trusted_time(
    open_files: Callable[[], VoiceFiles],
) -> None:
    clock = Clock()
    store = VoiceStore(open_files())
    libraries = [library_on(VoiceStore(open_files()), clock) for _ in range(2)]
    for library in libraries:
        with pytest.raises(UnknownVoiceError):
            library.resolve("anna")
    store.add(stored(), CLIP, RATE)
    for library in libraries:
        clip = library.resolve("anna").clip
        assert clip is not None
        assert clip.num_frames == 25
        assert library.list()[-1]["uploaded"]
    store.delete("anna")
    clock.now_s += store.trust_s
    for library in libraries:
        assert all(not voice["uploaded"] for voice in library.list())
        with pytest.raises(UnknownVoiceError):
            library.resolve("anna")


def test_a_voice_made_again_is_read_again(store: VoiceStore) -> None:
    clock = Clock()
    library = library_on(store, clock)
    store.add(stored(), CLIP, RATE)
    first = library.resolve("anna")
    clock.now_s += store.trust_s
    assert library.resolve("anna").clip is first.clip
    store.delete("anna")
    store.add(stored(), CLIP[: RATE // 2], RATE)
    library.forget("anna")
    clip = library.resolve("anna").clip
    assert clip is not None
    assert clip.num_frames == 13


def test_a_preset_goes_before_an_upload(store: VoiceStore) -> None:
    store.add(stored("en_woman"), CLIP, RATE)
    library = library_on(store)
    assert library.resolve("en_woman").name == "English Woman"
    assert library.names.count("en_woman") == 1


def test_the_first_upload_of_an_id_wins(store: VoiceStore) -> None:
    first = stored(transcript="First.")
    store.add(first, CLIP, RATE)
    with pytest.raises(VoiceConflictError, match="anna"):
        store.add(stored(transcript="Second."), CLIP[:9600], RATE)
    assert store.get("anna") == first
    clip = store.read_clip(first)
    assert clip is not None
    assert clip[0].size == CLIP.size


def test_one_of_many_uploads_at_once_is_kept_whole(
    open_files: Callable[[], VoiceFiles],
) -> None:
    stores = [VoiceStore(open_files()) for _ in range(4)]
    lengths = [9600 + 960 * index for index in range(4)]

    def add(index: int) -> str | None:
        voice = stored(transcript=f"{index}")
        try:
            stores[index].add(voice, CLIP[: lengths[index]], RATE)
        except VoiceConflictError:
            return None
        return voice.version

    with ThreadPoolExecutor(4) as pool:
        versions = list(pool.map(add, range(4)))
    winner = stores[0].get("anna")
    assert winner is not None
    assert [version for version in versions if version] == [winner.version]
    clip = stores[0].read_clip(winner)
    assert clip is not None
    assert clip[0].size == lengths[int(winner.transcript or "")]


def test_uploads_and_deletions_at_once_leave_whole_voices_or_none(
    open_files: Callable[[], VoiceFiles],
) -> None:
    def change(index: int) -> None:
        store = VoiceStore(open_files())
        for _ in range(4):
            try:
                if index % 2:
                    store.add(stored(), CLIP[:9600], RATE)
                else:
                    store.delete("anna")
            except (VoiceConflictError, VoiceNotFoundError):
                pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(change, range(4)))
    store = VoiceStore(open_files())
    for voice in store.voices():
        assert store.read_clip(voice) is not None
        store.delete(voice.voice_id)
    assert store.voices() == []
    store.add(stored(), CLIP, RATE)


def test_the_number_of_voices_is_limited(open_files: Callable[[], VoiceFiles]) -> None:
    store = VoiceStore(open_files(), max_voices=1)
    store.add(stored(), CLIP, RATE)
    with pytest.raises(VoiceConflictError, match="max-stored-voices"):
        store.add(stored("other"), CLIP, RATE)


def test_deleting_what_is_not_there(store: VoiceStore) -> None:
    with pytest.raises(VoiceNotFoundError):
        store.delete("anna")
    with pytest.raises(VoiceNotFoundError):
        store.delete("../anna")


def test_a_clip_that_was_deleted_meanwhile(store: VoiceStore) -> None:
    voice = stored()
    store.add(voice, CLIP, RATE)
    store.delete("anna")
    assert store.read_clip(voice) is None


RECORDS = ["", "[]", "{}", '{"voice_id": 1, "extra": 2}', "\udcff"]
HOSTILE = '{"voice_id": "b", "name": "B", "kind": "prompt", "created_at": 1, "version": "../x"}'


@pytest.mark.parametrize("record", [*RECORDS, HOSTILE])
def test_a_damaged_record_is_passed_over(
    open_files: Callable[[], VoiceFiles], record: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = open_files()
    store = VoiceStore(files)
    store.add(stored(), CLIP, RATE)
    assert files.create("bad", "1", record.encode(errors="surrogateescape"), None)
    assert [voice.voice_id for voice in store.voices()] == ["anna"]
    assert store.get("bad") is None


def test_a_failed_upload_leaves_nothing_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(VoiceStoreError):
        VoiceStore(FolderFiles(tmp_path)).add(stored(), CLIP, RATE)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = VoiceStore(FolderFiles(tmp_path / "file"))
    with pytest.raises(VoiceStoreError):
        store.voices()


def test_debris_of_a_crash_is_removed_from_a_folder_once_it_is_old(tmp_path: Path) -> None:
    for name, age_s in ((".new-a", 2 * HOUR_S), (".old-b", 2 * HOUR_S), (".new-c", 5)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    assert VoiceStore(FolderFiles(tmp_path)).voices() == []
    assert os.listdir(tmp_path) == [".new-c"]


def test_keys_of_a_bucket(bucket: str) -> None:
    store = VoiceStore(BucketFiles(bucket, "tts/voices"))
    voice = stored()
    store.add(voice, CLIP, RATE)
    with pytest.raises(VoiceConflictError):
        store.add(stored(), CLIP, RATE)
    assert keys(bucket) == [
        f"tts/voices/anna/{voice.version}.wav",
        "tts/voices/anna/voice.json",
    ]
    VoiceStore(BucketFiles(bucket, "")).add(stored("top"), None, 0)
    assert keys(bucket)[0] == "top/voice.json"
    store.delete("anna")
    assert keys(bucket) == ["top/voice.json"]


def test_a_clip_without_record_is_no_voice_and_goes_once_it_is_old(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    boto3.client("s3").put_object(Bucket=bucket, Key="broken/1.wav", Body=b"x")
    store = VoiceStore(BucketFiles(bucket, ""))
    assert store.voices() == []
    store.add(stored(), None, 0)
    assert keys(bucket) == ["anna/voice.json", "broken/1.wav"]
    monkeypatch.setattr("vllm.entrypoints.bosonai.voice_bucket._DEBRIS_AGE", -timedelta(days=1))
    store.add(stored("other"), CLIP[:9600], RATE)
    assert "broken/1.wav" not in keys(bucket)
    assert {voice.voice_id for voice in store.voices()} == {"anna", "other"}


def test_a_bucket_is_listed_page_by_page(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = BucketFiles(bucket, "")
    for index in range(5):
        files.create(f"v{index}", "1", b"{}", None)
    ask, pages = files._ask, []

    def ask_for_two(operation: str, **arguments: Any) -> dict[str, Any]:
        if operation == "list_objects_v2":
            arguments["MaxKeys"] = 2
            pages.append(arguments)
        return ask(operation, **arguments)

    monkeypatch.setattr(files, "_ask", ask_for_two)
    assert list(files.records()) == [f"v{index}" for index in range(5)]
    assert len(pages) == 3


def test_unchanged_records_are_not_fetched_again(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = BucketFiles(bucket, "")
    for name in "ab":
        files.create(name, "1", b"old", None)
    assert files.records() == {"a": b"old", "b": b"old"}
    boto3.client("s3").put_object(Bucket=bucket, Key="b/voice.json", Body=b"new")
    fetched: list[str] = []
    record = files.record
    monkeypatch.setattr(files, "record", lambda name: fetched.append(name) or record(name))
    assert files.records() == {"a": b"old", "b": b"new"}
    assert fetched == ["b"]


def test_an_upload_whose_answer_was_lost_counts(bucket: str) -> None:
    files = BucketFiles(bucket, "")
    assert files._put_first("anna/voice.json", b"mine")
    assert files._put_first("anna/voice.json", b"mine"), "boto3 sent it a second time"
    assert not files._put_first("anna/voice.json", b"another")


def test_a_write_that_met_another_is_made_again(s3: None) -> None:
    """S3 answers 409 where a deletion came between; the server of these tests never does."""
    files = BucketFiles("voices", "")
    with Stubber(files._client) as answers:
        answers.add_client_error("put_object", "ConditionalRequestConflict", http_status_code=409)
        answers.add_response("put_object", {})
        assert files._put_first("anna/voice.json", b"mine")
        answers.assert_no_pending_responses()


def test_a_bucket_that_is_not_there(s3: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        store = VoiceStore(BucketFiles("nowhere", ""))
        for ask in (store.voices, lambda: store.get("a"), lambda: store.add(stored(), None, 0)):
            with pytest.raises(VoiceStoreError):
                ask()
    assert "NoSuchBucket" in caplog.text


@pytest.fixture
def dead_port(monkeypatch: pytest.MonkeyPatch, s3: None) -> Iterator[socket.socket]:
    """A bucket's service that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        config = "vllm.entrypoints.bosonai.voice_bucket._CONFIG"
        monkeypatch.setattr(f"{config}.read_timeout", 0.2)
        monkeypatch.setattr(f"{config}.retries", {"total_max_attempts": 1})
        yield listener


def test_a_service_that_says_nothing_is_asked_once_in_a_while(
    dead_port: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    store = VoiceStore(BucketFiles("voices", "", clock=clock))
    for pause_s, is_asked in ((0.0, True), (1.0, False), (3.9, False), (0.2, True), (4.0, False)):
        clock.now_s += pause_s
        caplog.clear()
        with caplog.at_level(logging.ERROR), pytest.raises(VoiceStoreError):
            store.get("anna")
        assert ("timeout" in caplog.text.lower()) == is_asked, pause_s


def test_known_voices_speak_while_the_store_fails(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    files = BucketFiles(bucket, "")
    store = VoiceStore(files)
    library = library_on(store, clock)
    for name in ("anna", "bert"):
        store.add(stored(name), CLIP, RATE)
    voice = library.resolve("anna")

    def fail(*_: object, **__: object) -> None:
        raise VoiceStoreError("down")

    monkeypatch.setattr(files, "_ask", fail)
    clock.now_s += HOUR_S
    assert library.resolve("anna").clip is voice.clip
    assert library.resolve("alloy").voice_id == "en_woman"
    for name in ("bert", "nobody"):
        with pytest.raises(VoiceStoreError):
            library.resolve(name)


def test_a_deletion_during_a_look_is_not_overlooked(
    store: VoiceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = library_on(store)
    store.add(stored(), CLIP, RATE)
    get = store.get

    def delete_after(voice_id: str) -> StoredVoice | None:
        found = get(voice_id)
        monkeypatch.setattr(store, "get", get)
        store.read_clip, read_clip = lambda voice: clip, store.read_clip
        clip = read_clip(found)
        store.delete(voice_id)
        library.forget(voice_id)
        return found

    monkeypatch.setattr(store, "get", delete_after)
    assert library.resolve("anna").voice_id == "anna"
    with pytest.raises(UnknownVoiceError):
        library.resolve("anna")


def test_boto3_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm.entrypoints.bosonai.voice_bucket")
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigError, match=r"boto3.*higgs-audio-vllm\[s3\]"):
        open_store(ServerConfig(voice_store="s3://voices/tts"))


@pytest.mark.parametrize(
    ("name", "voice_id"),
    [
        ("Anna", "Anna"),
        ("José María", "Jose_Maria"),
        ("../../etc/passwd", "etc_passwd"),
        ("a\\b:c", "a_b_c"),
        ("x" * 64, "x" * 64),
    ],
)
def test_ids_of_names(name, voice_id):
    assert id_of_name(name) == voice_id


def test_a_name_without_latin_letters_gets_a_random_id():
    assert id_of_name("婉婷").startswith("voice_")
    assert id_of_name("婉婷") != id_of_name("婉婷")


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\0b", "x" * 65])
def test_names_that_are_refused(name):
    with pytest.raises(InvalidRequestError) as caught:
        id_of_name(name)
    assert caught.value.param == "name"
