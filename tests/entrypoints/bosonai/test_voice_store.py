"""The store of uploaded voices: whole or not at all, shared, bounded, closed to paths."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from vllm.entrypoints.bosonai.voice_store import StoredVoice, VoiceStore, id_of_name, new_id
from vllm.entrypoints.bosonai.voices import VoiceLibrary
from vllm.exceptions import (
    InvalidRequestError,
    UnknownVoiceError,
    VoiceConflictError,
    VoiceNotFoundError,
    VoiceStoreError,
)

RATE = 24_000
CLIP = np.sin(np.arange(RATE) / 20).astype(np.float32) * 0.5


def stored(voice_id="anna", **changes):
    fields = {"voice_id": voice_id, "name": "Anna", "kind": "audio_sample", "created_at": 7}
    return StoredVoice(**(fields | {"version": new_id(), "transcript": "Hello."} | changes))


def library_on(store):
    return VoiceLibrary(
        sample_rate=RATE,
        hop_length=960,
        codec_fingerprint="none",
        num_codebooks=8,
        can_encode=True,
        store=store,
    )


def test_a_voice_survives_a_restart(tmp_path):
    voice = stored(consent="yes", name="Änna")
    VoiceStore(tmp_path).add(voice, CLIP, RATE)
    again = VoiceStore(tmp_path)
    assert again.voices() == [voice]
    samples, rate = again.read_clip(voice)
    assert rate == RATE
    np.testing.assert_allclose(samples, CLIP, atol=1e-4)


def test_every_library_on_the_folder_sees_a_voice_at_once(tmp_path):
    here, there = library_on(VoiceStore(tmp_path)), library_on(VoiceStore(tmp_path))
    VoiceStore(tmp_path).add(stored(), CLIP, RATE)
    for library in (here, there):
        assert library.resolve("anna").clip.num_frames == 25
        assert library.list()[-1]["uploaded"]
    VoiceStore(tmp_path).delete("anna")
    for library in (here, there):
        with pytest.raises(UnknownVoiceError):
            library.resolve("anna")


def test_a_voice_made_again_is_read_again(tmp_path):
    store = VoiceStore(tmp_path)
    library = library_on(store)
    store.add(stored(), CLIP, RATE)
    first = library.resolve("anna")
    assert library.resolve("anna") is first
    store.delete("anna")
    store.add(stored(), CLIP[: RATE // 2], RATE)
    assert library.resolve("anna").clip.num_frames == 13


def test_a_preset_goes_before_an_upload(tmp_path):
    VoiceStore(tmp_path).add(stored("en_woman"), CLIP, RATE)
    library = library_on(VoiceStore(tmp_path))
    assert library.resolve("en_woman").name == "English Woman"
    assert library.names.count("en_woman") == 1


def test_the_first_upload_of_an_id_wins(tmp_path):
    store = VoiceStore(tmp_path)
    store.add(stored(transcript="First."), CLIP, RATE)
    with pytest.raises(VoiceConflictError, match="anna"):
        store.add(stored(transcript="Second."), CLIP, RATE)
    assert store.get("anna").transcript == "First."
    assert os.listdir(tmp_path) == ["anna"]


def test_a_failed_upload_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(VoiceStoreError):
        VoiceStore(tmp_path).add(stored(), CLIP, RATE)
    assert os.listdir(tmp_path) == []


def test_debris_of_a_crash_is_removed_once_it_is_old(tmp_path):
    for name, age_s in ((".new-a", 7200), (".old-b", 7200), (".new-c", 5)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    assert VoiceStore(tmp_path).voices() == []
    assert os.listdir(tmp_path) == [".new-c"]


def test_the_number_of_voices_is_limited(tmp_path):
    store = VoiceStore(tmp_path, max_voices=1)
    store.add(stored(), CLIP, RATE)
    with pytest.raises(VoiceConflictError, match="max-stored-voices"):
        store.add(stored("other"), CLIP, RATE)


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"voice_id": 1, "extra": 2}', "\udcff"])
def test_a_damaged_record_is_passed_over(tmp_path, record):
    store = VoiceStore(tmp_path)
    store.add(stored(), CLIP, RATE)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "voice.json").write_text(record, errors="surrogateescape")
    assert [voice.voice_id for voice in store.voices()] == ["anna"]


def test_deleting_what_is_not_there(tmp_path):
    with pytest.raises(VoiceNotFoundError):
        VoiceStore(tmp_path / "none").delete("anna")


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
