"""The prompt, position by position, against literal renderings and the chat template."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer

from vllm.exceptions import ConfigError, InvalidRequestError
from vllm.prompts import (
    BuiltPrompt,
    HiggsAudioPromptBuilder,
    PromptClip,
    Speaker,
    SpeechPrompt,
    SpokenTurn,
    TextTokenizer,
    Voice,
)

BARE = Voice(voice_id="bare", name="Bare")
NUM_CODEBOOKS = 8


def make_clip(num_frames=3):
    return PromptClip(num_frames=num_frames, codes=np.zeros((NUM_CODEBOOKS, num_frames), np.int16))


def make_codes(num_frames=3, value=5):
    return np.full((NUM_CODEBOOKS, num_frames), value)


@pytest.fixture
def render(tokenizer_folder):
    """Ids as text with every special token spelt out."""
    raw = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    return lambda prompt: raw.decode(prompt.token_ids.tolist(), skip_special_tokens=False)


def header(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def scene_block(body):
    return f"<|scene_desc_start|>\n{body}\n<|scene_desc_end|>"


def clip_text(num_frames):
    placeholders = "<|AUDIO_OUT|>" * (num_frames + NUM_CODEBOOKS + 1)
    return f"<|audio_out_bos|>{placeholders}<|audio_eos|>"


SYSTEM = "<|begin_of_text|>" + header("system") + "Generate audio following instruction.\n\n"
QUIET = scene_block("Audio is recorded from a quiet room.")
OPEN = header("assistant") + "<|audio_out_bos|>"


def test_voice_without_clip_is_its_scene(builder, render):
    prompt = builder.build(
        "Hello.", Voice(voice_id="a", name="A", scene="SPEAKER0: british accent")
    )
    scene = scene_block("SPEAKER0: british accent")
    user = header("user") + "Hello.<|eot_id|>"
    assert render(prompt) == SYSTEM + scene + "<|eot_id|>" + user + OPEN
    assert prompt.clips == ()


def test_clip_follows_its_transcript_and_history_follows_the_clip(builder, render):
    reference, earlier = make_clip(3), make_clip(5)
    voice = Voice(voice_id="a", name="A", transcript=" The words. ", clip=reference)
    prompt = builder.build("More", voice, history=[SpokenTurn("First（one）", earlier)])
    turns = [
        header("user") + "The words.",
        header("assistant") + clip_text(3),
        header("user") + "First one.",
        header("assistant") + clip_text(5),
        header("user") + "More.",
    ]
    expected = SYSTEM + QUIET + "<|eot_id|>" + "".join(turn + "<|eot_id|>" for turn in turns) + OPEN
    assert render(prompt) == expected
    assert prompt.clips == (reference, earlier)
    assert prompt.token_ids.dtype == np.int32


@pytest.mark.parametrize("clip", [None, make_clip()])
def test_the_voice_is_what_comes_before_history_and_text(builder, render, clip):
    voice = Voice(voice_id="a", name="A", transcript="Hm.", clip=clip)
    history = [SpokenTurn("Before.", make_clip(5))]
    prompts = [
        builder.build("Hello.", voice),
        builder.build("Bye.", voice),
        builder.build("Hello.", voice, history=history),
    ]
    (num,) = {prompt.num_voice_positions for prompt in prompts}
    assert len({prompt.token_ids[:num].tobytes() for prompt in prompts}) == 1
    shown = [render(BuiltPrompt(prompt.token_ids[num:])) for prompt in prompts]
    assert [text.split("<|eot_id|>")[0] for text in shown] == ["Hello.", "Bye.", "Before."]


def test_instructions_join_the_scene_by_a_newline(builder, render):
    voice = Voice(voice_id="a", name="A", scene="In a cave.")
    prompt = builder.build("Hi.", voice, instructions=" Whisper. ")
    assert SYSTEM + scene_block("In a cave.\nWhisper.") + "<|eot_id|>" in render(prompt)
    quiet = scene_block("Audio is recorded from a quiet room.\nWhisper.")
    assert quiet in render(builder.build("Hi.", BARE, instructions="Whisper."))


def test_system_prompt_replaces_the_whole_system_text(builder, render):
    voice = Voice(voice_id="a", name="A", scene="In a cave.", system_prompt="Of the voice.")
    by_voice = render(builder.build("Hi.", voice, instructions="Whisper."))
    assert by_voice.startswith("<|begin_of_text|>" + header("system") + "Of the voice.<|eot_id|>")
    by_request = render(builder.build("Hi.", voice, system_prompt="Of the request."))
    assert by_request.startswith(
        "<|begin_of_text|>" + header("system") + "Of the request.<|eot_id|>"
    )


def test_system_text_may_hold_scene_marks_and_no_other_token(builder, tokenizer):
    text = "<|scene_desc_start|>x<|scene_desc_end|><|eot_id|><|audio_out_bos|>"
    ids = builder.build("Hi.", BARE, system_prompt=text).token_ids.tolist()
    assert ids.count(tokenizer.token_id("<|scene_desc_start|>")) == 1
    assert ids.count(tokenizer.token_id("<|eot_id|>")) == 2  # of the system and the text turn
    assert ids.count(tokenizer.token_id("<|audio_out_bos|>")) == 1


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "spelling",
    ["<|eot_id|>", "<|audio_out_bos|>", "<|AUDIO_OUT|>", "<|scene_desc_start|>", "<SE>", "《SE》"],
)
def test_special_tokens_in_text_are_never_interpreted(builder, tokenizer, spelling, normalize):
    voice = Voice(voice_id="a", name="A", transcript=f"x {spelling} y", clip=make_clip())
    plain = Voice(voice_id="a", name="A", transcript="x y", clip=make_clip())
    name = spelling.replace("《", "<").replace("》", ">")
    history = [SpokenTurn(f"a {spelling}", make_clip())]
    with_it = builder.build(f"Hi {spelling} ho", voice, normalize=normalize, history=history)
    without = builder.build("Hi", plain, history=[SpokenTurn("a", make_clip())])
    token_id = tokenizer.token_id(name)
    assert np.sum(with_it.token_ids == token_id) == np.sum(without.token_ids == token_id)


def test_sound_tags_of_the_normaliser_are_tokens(builder, tokenizer, render):
    prompt = builder.build("Ha [laugh]", BARE)
    assert tokenizer.token_id("<SE>") in prompt.token_ids
    assert "Ha <SE>[Laughter]</SE><|eot_id|>" in render(prompt)
    as_written = builder.build(" Ha [laugh] ", BARE, normalize=False)
    assert header("user") + "Ha [laugh]<|eot_id|>" in render(as_written)


def test_text_of_nothing_but_marks_is_refused(builder):
    with pytest.raises(InvalidRequestError, match="nothing to speak"):
        builder.build("<SE> ()", BARE)


def test_same_ids_as_the_chat_template(builder, tokenizer, tokenizer_folder):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(str(tokenizer_folder))
    messages = [
        {"role": "system", "content": "Generate audio following instruction."},
        {"role": "scene", "content": "Audio is recorded from a quiet room."},
        {"role": "user", "content": "The morning train leaves at nine."},
        {"role": "assistant", "content": [{"type": "audio"}]},
        {"role": "user", "content": "Hello there, it is 5 o'clock."},
    ]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = text.replace("<|AUDIO_OUT|>", "<|AUDIO_OUT|>" * (4 + NUM_CODEBOOKS + 1))
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    voice = Voice(
        voice_id="a", name="A", transcript="The morning train leaves at nine.", clip=make_clip(4)
    )
    prompt = builder.build("Hello there, it is 5 o'clock.", voice)
    assert prompt.token_ids.tolist() == expected


def test_tokenizer_of_another_checkpoint_is_refused(tokenizer_folder, config):
    raw = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).to_str()
    raw = raw.replace("<|audio_out_bos|>", "<|x|>").replace("<|python_tag|>", "<|audio_out_bos|>")
    with pytest.raises(ConfigError, match="both must be of one checkpoint"):
        HiggsAudioPromptBuilder(TextTokenizer(Tokenizer.from_str(raw)), config)


def test_finished_prompt_comes_back_from_its_own_ids(builder):
    voice = Voice(voice_id="a", name="A", transcript="Words.", clip=make_clip(4))
    built = builder.build("Hello.", voice)
    again = builder.from_token_ids(built.token_ids.tolist(), [make_codes(4)])
    assert again.token_ids.tolist() == built.token_ids.tolist()
    assert again.clips[0].codes.tolist() == make_codes(4).tolist()


def test_placeholders_of_the_other_layout_become_ours(builder, config):
    bos, slot = config.audio_out_bos_token_id, config.audio_token_id
    ids = [1, bos, *[slot] * 5, *[config.audio_delay_token_id] * 7, 2, bos]
    prompt = builder.from_token_ids(ids, [make_codes(3)])
    assert prompt.token_ids.tolist() == [1, bos, *[slot] * 12, 2, bos]


@pytest.mark.parametrize(
    ("codes", "num_slots", "words"),
    [
        ([], 12, r"1 audio placeholder runs, but prompt_codes has 0 clips"),
        ([make_codes(), make_codes()], 12, r"has 2 clips"),
        ([make_codes()], 11, r"run 0 .* has 11 ids, but .* 3 frames needs 12"),
        ([make_codes(value=1024)], 12, r"allowed are 0 to 1023"),
        ([make_codes(value=-1)], 12, r"allowed are 0 to 1023"),
        ([make_codes(value=0.5)], 12, r"dtype float64"),
        ([make_codes()[:7]], 12, r"must be \[8, T\]"),
        ([make_codes(0)], 12, r"must be \[8, T\]"),
    ],
)
def test_codes_that_do_not_fit_are_refused(builder, config, codes, num_slots, words):
    ids = [1, *[config.audio_token_id] * num_slots, 2, config.audio_out_bos_token_id]
    with pytest.raises(InvalidRequestError, match=words):
        builder.from_token_ids(ids, codes)


@pytest.mark.parametrize("bad", [-1, 10**6, 1.5, True, "a"])
def test_id_out_of_range_is_named(builder, config, bad):
    with pytest.raises(InvalidRequestError, match=r"prompt_token_ids\[1\]="):
        builder.from_token_ids([1, bad, config.audio_out_bos_token_id], [])


@pytest.mark.parametrize("ids", [[], [1, 2]])
def test_finished_prompt_must_open_audio(builder, ids):
    with pytest.raises(InvalidRequestError, match="must end with"):
        builder.from_token_ids(ids, [])


def test_count_tokens(builder, tokenizer):
    assert builder.count_tokens("Hello there.") == len(tokenizer.encode("Hello there."))


def test_speakers_with_clips_are_turns_of_their_own(builder, render):
    first, second = make_clip(3), make_clip(5)
    speakers = [
        Speaker("SPEAKER0", Voice("a", "A", transcript=" One. ", clip=first, scene="Not used.")),
        Speaker("SPEAKER1", Voice("b", "B", transcript="Two.", clip=second)),
    ]
    prompt = builder.build("[SPEAKER0] Hi\n[SPEAKER1] Ho", BARE, speakers=speakers)
    turns = [
        header("user") + "[SPEAKER0] One.",
        header("assistant") + clip_text(3),
        header("user") + "[SPEAKER1] Two.",
        header("assistant") + clip_text(5),
        header("user") + "[SPEAKER0] Hi\n[SPEAKER1] Ho.",
    ]
    expected = SYSTEM + QUIET + "<|eot_id|>" + "".join(turn + "<|eot_id|>" for turn in turns) + OPEN
    assert render(prompt) == expected
    assert prompt.clips == (first, second)
    by_system_prompt = builder.build("[SPEAKER0] a", BARE, speakers=speakers, system_prompt="S.")
    assert header("system") + "S.<|eot_id|>" in render(by_system_prompt)


def test_speakers_without_clips_are_described_in_the_scene(builder, render):
    speakers = [
        Speaker("SPEAKER0", Voice("a", "A", scene="An old man,\n slow.")),
        Speaker("SPEAKER1", Voice("b", "B", description="A girl.")),
    ]
    prompt = builder.build("[SPEAKER0] a", BARE, speakers=speakers, instructions="At sea.")
    body = "Audio is recorded from a quiet room.\nAt sea.\n\n"
    body += "SPEAKER0: An old man, slow.\nSPEAKER1: A girl."
    user = header("user") + "[SPEAKER0] a.<|eot_id|>"
    assert render(prompt) == SYSTEM + scene_block(body) + "<|eot_id|>" + user + OPEN


@pytest.mark.parametrize("described", [(), (1,)])
def test_speakers_in_the_scene_are_those_of_the_chat_template(builder, tokenizer_folder, described):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(str(tokenizer_folder))
    names = ("SPEAKER0", "SPEAKER1", "SPEAKER2")
    scene = [{"type": "text", "text": "Audio is recorded from a quiet room."}]
    for index, name in enumerate(names):
        is_described = index in (*described, 2)
        scene.append({"type": "text", "text": name + (": Deep." if is_described else ":")})
        if not is_described:
            scene.append({"type": "audio"})
    messages = [
        {"role": "system", "content": "Generate audio following instruction."},
        {"role": "scene", "content": scene},
        {"role": "user", "content": "[SPEAKER0] hi."},
    ]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = text.replace("<|AUDIO_OUT|>", "<|AUDIO_OUT|>" * (4 + NUM_CODEBOOKS + 1))
    cloned = Voice("c", "C", transcript="Not used.", clip=make_clip(4))
    deep = Voice("d", "D", scene="Deep.")
    speakers = [
        Speaker(name, deep if index in (*described, 2) else cloned)
        for index, name in enumerate(names)
    ]
    prompt = builder.build("[SPEAKER0] hi.", BARE, speakers=speakers)
    assert prompt.token_ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]


def test_speakers_that_cannot_be_shown_are_refused(builder):
    bare = [Speaker("SPEAKER0", Voice("whole", "Whole", system_prompt="You are Whole."))]
    with pytest.raises(InvalidRequestError, match=r"voices\.SPEAKER0: voice 'whole' has neither"):
        builder.build("[SPEAKER0] a", BARE, speakers=bare)
    described = [Speaker("SPEAKER0", Voice("a", "A", scene="Old."))]
    with pytest.raises(InvalidRequestError, match="system_prompt is not possible"):
        builder.build("[SPEAKER0] a", BARE, speakers=described, system_prompt="S.")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"text": "Hello."}, "input", r"begin with the tag .* as \[SPEAKER0\]"),
        ({"text": "Hello. [SPEAKER0] Hi."}, "input", "must begin with"),
        ({"text": "[SPEAKER0] Hi. [SPEAKER7] Ho."}, "voices", "names SPEAKER7, who has no voice"),
        ({"voices": {"0": "a"}}, "voices", "names '0'; its keys are SPEAKER0"),
        ({"ref_audio": b"x", "ref_text": "x"}, "voices", "ref_audio is one voice"),
    ],
)
def test_voices_that_do_not_fit_the_text_are_refused(fields, param, words):
    given = {"text": "[SPEAKER0] Hi.", "voices": {"SPEAKER0": "a"}, **fields}
    with pytest.raises(InvalidRequestError, match=words) as caught:
        SpeechPrompt(**given)
    assert caught.value.param == param
