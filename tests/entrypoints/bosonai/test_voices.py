"""The voice library: the shipped folder, resolution, checks, codes and rereading."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vllm.audio import encode_all, lookup
from vllm.entrypoints import llm
from vllm.entrypoints.bosonai import api_server
from vllm.entrypoints.bosonai.voice_store import FolderFiles, StoredVoice, VoiceStore, new_id
from vllm.entrypoints.bosonai.voices import OPENAI_VOICE_ALIASES, SHIPPED_PRESETS, VoiceLibrary
from vllm.entrypoints.cli_args import parse_serve_args
from vllm.entrypoints.llm import LLM
from vllm.exceptions import ConfigError, InvalidRequestError, UnknownVoiceError

HOP = 960


def make_library(folder=None, **changes):
    options = {
        "sample_rate": 24000,
        "hop_length": HOP,
        "codec_fingerprint": "abc",
        "num_codebooks": 2,
        "can_encode": True,
        "refresh_interval_s": 0.0,
    }
    return VoiceLibrary(folder, **(options | changes))


def write_wav(path, num_samples=2400, rate=24000):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.sin(np.arange(num_samples) / 20) * 9000).astype("<i2").tobytes())


def write_presets(folder, entries):
    write_wav(folder / "a.wav")
    (folder / "config.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


CLIP = {"transcript": "Hello.", "audio_file": "a.wav"}


def test_shipped_voices_have_names_languages_and_a_default():
    listed = {each["id"]: each for each in make_library().list()}
    names = {voice_id: (each["name"], each["language"]) for voice_id, each in listed.items()}
    assert names == {
        "en_man": ("English Man", "en"),
        "en_woman": ("English Woman", "en"),
        "de_man": ("German Man", "de"),
        "de_woman": ("German Woman", "de"),
        "zh_man": ("Chinese Man", "zh"),
        "zh_woman": ("Chinese Woman", "zh"),
    }
    assert [voice_id for voice_id, each in listed.items() if each["default"]] == ["en_woman"]
    assert set(listed["en_man"]) == {
        "id", "voice_id", "name", "description", "language", "labels", "default", "duration",
        "uploaded", "speaks",
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted(SHIPPED_PRESETS.glob("*.wav")), ids=lambda path: path.stem)
def test_shipped_clip_is_short_clean_mono_speech(path):
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24000)
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    assert path.stat().st_size < 400_000
    assert 4 <= len(samples) / 24000 <= 8
    assert 0.3 < np.abs(samples).max() < 0.9
    loud = np.flatnonzero(np.abs(samples) > 0.005)
    assert np.diff(loud).max() < 0.8 * 24000


def test_shipped_clips_are_equally_loud():
    levels = {}
    for path in SHIPPED_PRESETS.glob("*.wav"):
        with wave.open(str(path)) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
        frames = samples[: len(samples) // 480 * 480].reshape(-1, 480)  # 20 ms
        power = (frames**2).mean(axis=1)
        speech = power[power > 1e-3 * power.max()]
        levels[path.stem] = 10 * np.log10(speech.mean())
    assert len(levels) == 6
    assert max(levels.values()) - min(levels.values()) < 1, levels


def test_readme_documents_every_shipped_voice():
    readme = (SHIPPED_PRESETS / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in make_library().names)


def test_clip_is_padded_to_whole_frames():
    clip = make_library().resolve("en_man").clip
    assert clip.samples.dtype == np.float32
    assert len(clip.samples) == clip.num_frames * HOP


def test_all_openai_names_resolve():
    library = make_library()
    assert len(OPENAI_VOICE_ALIASES) == 13
    assert {library.resolve(name).voice_id for name in OPENAI_VOICE_ALIASES} == {
        "en_man",
        "en_woman",
    }


def test_a_voice_that_does_not_speak_is_stood_in_for_by_the_default(tmp_path):
    entries = {"a": {"speaks": False}, "b": {"scene": "Outside."}}
    library = make_library(write_presets(tmp_path, entries))
    found = library.resolve("a")
    assert (found.voice_id, found.asked_for, found.scene) == ("b", "a", "Outside.")
    assert library.resolve("b").asked_for == ""
    assert [(each["id"], each["speaks"]) for each in library.list()] == [("a", False), ("b", True)]


def test_the_default_voice_must_speak(tmp_path):
    folder = write_presets(tmp_path, {"a": {"speaks": False}, "b": {"scene": "Outside."}})
    with pytest.raises(ConfigError, match=r"cannot speak voice 'a'.*such as 'b'"):
        make_library(folder, default_voice="a")


def test_voices_none_of_which_speaks_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="none of the voices speaks"):
        make_library(write_presets(tmp_path, {"a": {"speaks": False}}))


def test_a_trained_voice_needs_neither_clip_nor_scene(tmp_path):
    voice = make_library(write_presets(tmp_path, {"a": {"trained": True}})).resolve("a")
    assert voice.is_trained
    assert voice.clip is None


def test_a_voice_says_how_much_it_speaks_at_once(tmp_path):
    entries = {"a": {"trained": True, "max_chars": 40}, "b": {"trained": True}}
    library = make_library(write_presets(tmp_path, entries))
    assert library.resolve("a").max_chars == 40
    assert library.resolve("b").max_chars == 300


@pytest.mark.parametrize("value", [0, -1, True, "40", 4.5])
def test_how_much_a_voice_speaks_at_once_is_a_positive_number(tmp_path, value):
    with pytest.raises(ConfigError, match="max_chars"):
        make_library(write_presets(tmp_path, {"a": {"trained": True, "max_chars": value}}))


def test_alias_without_its_voice_means_the_default(tmp_path):
    library = make_library(write_presets(tmp_path, {"other": CLIP}))
    assert library.resolve("alloy").voice_id == "other"


def test_unknown_voice_lists_the_names():
    with pytest.raises(UnknownVoiceError, match=r"'bob' is unknown.*en_woman, en_man") as caught:
        make_library().resolve("bob")
    assert caught.value.param == "voice"


def test_voice_may_be_an_object():
    assert make_library().resolve({"id": "de_man"}).voice_id == "de_man"


@pytest.mark.parametrize("voice", [{}, {"id": 3}, 7, {"id": None}])
def test_voice_of_a_wrong_type_is_refused(voice):
    with pytest.raises(InvalidRequestError, match="must be a name"):
        make_library().resolve(voice)


def test_default_is_flag_then_mark_then_first(tmp_path):
    folder = write_presets(tmp_path, {"a": CLIP, "b": CLIP | {"default": True}})
    assert make_library(folder).resolve(None).voice_id == "b"
    assert make_library(folder, default_voice="a").resolve(None).voice_id == "a"
    assert make_library(write_presets(tmp_path, {"c": CLIP, "d": CLIP})).default_id == "c"


def test_unknown_default_voice_is_refused():
    with pytest.raises(ConfigError, match=r"--default-voice bob: .* has en_woman, en_man"):
        make_library(default_voice="bob")


def test_unreadable_presets_are_told_with_their_flag(tmp_path):
    folder = write_presets(tmp_path, {"a": CLIP | {"audio_file": "none.wav"}})
    with pytest.raises(ConfigError, match=rf"--voice-presets-dir {folder}: voice 'a'.*none.wav"):
        VoiceLibrary.without_engine(folder)


def test_a_preset_that_is_no_audio_is_told_by_voice_and_file(tmp_path):
    path = tmp_path / "cover.png"
    for data, reason in ((b"\x89PNG no audio", "cannot be decoded as audio"), (b"", "is empty")):
        folder = write_presets(tmp_path, {"a": CLIP | {"audio_file": path.name}})
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=f"voice 'a': {path} {reason}") as caught:
            make_library(folder)
        assert "ref_audio" not in str(caught.value)


def test_null_in_a_preset_means_that_the_key_is_not_there(tmp_path):
    entry = CLIP | dict.fromkeys(("system_prompt", "scene", "language", "name", "default"))
    voice = make_library(write_presets(tmp_path, {"a": entry})).resolve("a")
    assert (voice.system_prompt, voice.scene, voice.language, voice.name) == (None, None, "en", "A")


@pytest.mark.parametrize(
    ("voice_id", "language"),
    [
        ("zh_man_sichuan", "zh"),
        ("ingrid_de", "de"),
        ("DE_man", "de"),
        ("broom_salesman", "en"),
        ("deborah", "en"),
        ("en_man_de", "en"),
    ],
)
def test_an_id_tells_the_language_that_a_preset_does_not(tmp_path, voice_id, language):
    presets = {voice_id: CLIP, "other": CLIP | {"language": "fr"}}
    library = make_library(write_presets(tmp_path, presets))
    voice = library.resolve(voice_id)
    assert (voice.language, voice.labels) == (language, {"language": language})
    assert library.resolve("other").language == "fr"


def test_the_server_checks_voices_before_it_makes_an_engine(monkeypatch):
    monkeypatch.setattr(api_server, "AsyncLLM", lambda *_: pytest.fail("an engine was made"))
    with pytest.raises(ConfigError, match=r"--default-voice bob: there is no such preset"):
        api_server.create_engine(parse_serve_args(["--model", "m", "--default-voice", "bob"]))


def test_the_offline_engine_checks_voices_before_it_loads(monkeypatch, tmp_path):
    monkeypatch.setattr(llm, "InprocClient", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=r"--default-voice bob"):
        LLM("m", default_voice="bob")
    with pytest.raises(ConfigError, match=rf"--voice-presets-dir {tmp_path}: .*config.json"):
        LLM(voices_dir=tmp_path)


def test_scene_and_system_prompt_stand_beside_the_clip(tmp_path):
    entry = CLIP | {"scene": "A cave.", "system_prompt": "Speak."}
    voice = make_library(write_presets(tmp_path, {"a": entry})).resolve("a")
    assert (voice.scene, voice.system_prompt, voice.transcript) == ("A cave.", "Speak.", "Hello.")
    assert voice.clip is not None


def test_clip_of_another_rate_is_resampled(tmp_path):
    write_presets(tmp_path, {"a": CLIP})
    write_wav(tmp_path / "a.wav", num_samples=4800, rate=48000)
    clip = make_library(tmp_path).resolve("a").clip
    assert clip.num_frames == 3  # 2400 samples padded to 2880


def test_clip_may_be_of_any_format(tmp_path):
    tone = np.sin(np.arange(2 * HOP, dtype=np.float32) / 20) / 2
    (tmp_path / "a.flac").write_bytes(encode_all(tone, lookup("flac"), 24000))
    entries = {"mine": {"transcript": "Hello.", "audio_file": "a.flac"}}
    voice = make_library(write_presets(tmp_path, entries)).resolve("mine")
    np.testing.assert_allclose(voice.clip.samples, tone, atol=1e-4)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (CLIP | {"sped": 1}, "unknown key 'sped'"),
        (CLIP | {"default": "yes"}, "default='yes' must be a bool"),
        ({"transcript": "Hello."}, "go together"),
        ({"name": "A"}, "says nothing of its sound"),
        (CLIP | {"audio_file": "gone.wav"}, "cannot read"),
        (CLIP | {"audio_file": "config.json"}, "config.json cannot be decoded"),
        ({"scene": "A cave.", "codes_file": "x"}, "codes_file needs"),
        ("text", "must be an object"),
    ],
)
def test_wrong_entry_is_named(tmp_path, entry, words):
    with pytest.raises(ConfigError, match=words) as caught:
        make_library(write_presets(tmp_path, {"bad_one": entry}))
    assert "'bad_one'" in str(caught.value)


def test_codec_that_cannot_encode_takes_shipped_codes(tmp_path):
    write_presets(tmp_path, {"a": CLIP | {"codes_file": "a.json"}, "b": CLIP})
    (tmp_path / "a.json").write_text(json.dumps({"abc": [[1, 2, 3], [4, 5, 6]]}))
    library = make_library(tmp_path, can_encode=False)
    clip = library.resolve("a").clip
    assert clip.codes.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert clip.samples is None
    with pytest.raises(InvalidRequestError, match=r"'b' cannot be used.*codec abc"):
        library.resolve("b")


def test_an_upload_speaks_in_parts_as_short_as_those_of_the_default_voice(tmp_path):
    write_presets(tmp_path, {"a": CLIP | {"max_chars": 56}})
    store = VoiceStore(FolderFiles(tmp_path / "voices"))
    keep_upload(store, "anna")
    assert make_library(tmp_path, store=store).resolve("anna").max_chars == 56


def keep_upload(store, voice_id):
    upload = StoredVoice(
        voice_id=voice_id,
        name=voice_id,
        kind="audio_sample",
        created_at=7,
        version=new_id(),
        transcript="Hello.",
    )
    store.add(upload, np.zeros(2400, np.float32), 24000)


@pytest.mark.parametrize(
    ("names", "pinned"),
    [
        (None, {"a", "en_man", "anna", "bert"}),
        ((), set()),
        (("en_man", "anna", "nobody"), {"en_man", "anna"}),
        (("echo",), {"en_man"}),
        (("alloy",), {"a"}),  # whose voice is not in the folder, so the default voice speaks
    ],
)
def test_named_voices_alone_are_pinned(tmp_path, names, pinned):
    write_presets(tmp_path, {"a": CLIP, "en_man": CLIP})
    store = VoiceStore(FolderFiles(tmp_path / "voices"))
    for voice_id in ("anna", "bert"):
        keep_upload(store, voice_id)
    library = make_library(tmp_path, store=store, pinned_voices=names)
    assert {name for name in library.names if library.resolve(name).is_pinned} == pinned


def test_codes_of_another_codec_are_not_used(tmp_path):
    write_presets(tmp_path, {"a": CLIP | {"codes_file": "a.json"}})
    (tmp_path / "a.json").write_text(json.dumps({"other": [[1], [2]]}))
    assert make_library(tmp_path).resolve("a").clip.codes is None


def test_misshapen_codes_are_refused(tmp_path):
    write_presets(tmp_path, {"a": CLIP | {"codes_file": "a.json"}})
    (tmp_path / "a.json").write_text(json.dumps({"abc": [[1, 2, 3]]}))
    with pytest.raises(ConfigError, match=r"shape \[1, 3\]"):
        make_library(tmp_path)


def test_changed_folder_is_reread_and_a_broken_one_is_logged_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    library = make_library(write_presets(tmp_path, {"a": CLIP}))
    write_presets(tmp_path, {"a": CLIP, "later": CLIP})
    assert library.names == ["a", "later"]
    (tmp_path / "config.json").write_text("{")
    with caplog.at_level("ERROR"):
        assert [library.names for _ in range(3)] == [["a", "later"]] * 3
    assert len(caplog.records) == 1
    write_presets(tmp_path, {"fresh": CLIP})
    assert library.names == ["fresh"]


def test_changed_clip_is_reread(tmp_path):
    library = make_library(write_presets(tmp_path, {"a": CLIP}))
    write_wav(tmp_path / "a.wav", num_samples=9600)
    assert library.resolve("a").clip.num_frames == 10


def test_clip_that_appears_after_its_entry_is_found(tmp_path):
    library = make_library(write_presets(tmp_path, {"a": CLIP}))
    write_presets(tmp_path, {"b": CLIP | {"audio_file": "b.wav"}})
    assert library.names == ["a"]
    write_wav(tmp_path / "b.wav")
    assert library.names == ["b"]


def test_files_are_not_looked_at_before_the_interval_is_over(tmp_path):
    now = 0.0
    library = make_library(
        write_presets(tmp_path, {"a": CLIP}), refresh_interval_s=10.0, clock=lambda: now
    )
    write_presets(tmp_path, {"b": CLIP})
    now = 9.9
    assert library.names == ["a"]
    now = 10.0
    assert library.names == ["b"]


def test_library_for_an_engine_suits_its_codec():
    info = SimpleNamespace(
        sample_rate=48000,
        hop_length=1920,
        codec_fingerprint="x",
        num_codebooks=8,
        can_encode=True,
        voices_folder="",
    )
    clip = VoiceLibrary.for_engine(info, default_voice="de_man").resolve().clip
    assert clip.num_frames == 137  # 5.46 s at 25 frames a second
    assert len(clip.samples) == 137 * 1920


def test_a_model_that_brings_voices_along_speaks_those_unless_a_folder_is_given(tmp_path):
    own, given = tmp_path / "own", tmp_path / "given"
    for folder, voice in ((own, "a"), (given, "b")):
        folder.mkdir()
        write_presets(folder, {voice: {"scene": "Outside."}})
    info = SimpleNamespace(
        sample_rate=24000,
        hop_length=HOP,
        codec_fingerprint="x",
        num_codebooks=8,
        can_encode=False,
        voices_folder=str(own),
    )
    assert VoiceLibrary.for_engine(info).names == ["a"]
    assert VoiceLibrary.for_engine(info, folder=given).names == ["b"]


def test_library_needs_neither_web_framework_nor_torch():
    root = Path(__file__).parents[3]
    code = (
        "import sys, vllm.entrypoints.bosonai.voices;"
        "print({'torch', 'fastapi', 'av', 'soxr'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
