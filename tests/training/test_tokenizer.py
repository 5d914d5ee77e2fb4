import pytest

from training.alphabet import SYMBOLS, split
from training.lexicon import load_lexicon
from training.prompt import FIRST_SYMBOL_ID, FIXED_TEXTS, PREFIX, SUFFIX, TOKEN_ID, UNKNOWN
from training.tokenizer import write_tokenizer
from vllm.prompts.tokenizer import TextTokenizer

LEXICON = load_lexicon()
NAME_OF_ID = {index: token for token, index in TOKEN_ID.items()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, LEXICON)
    return TextTokenizer.from_folder(folder)


def spoken(tokenizer, text: str) -> str:
    return "".join(NAME_OF_ID[each] for each in tokenizer.encode(text))


def test_every_word_of_the_vocabulary_is_pronounced_as_in_the_lexicon(tokenizer):
    roles = {"system", "user"}  # alone they are the roles of a prompt
    wrong = [word for word in LEXICON if spoken(tokenizer, f"{word}.") != f"{LEXICON[word]}."]
    assert not wrong
    assert all(spoken(tokenizer, role) in FIXED_TEXTS for role in roles)


def test_case_accents_and_spaces_do_not_matter(tokenizer):
    assert spoken(tokenizer, "HÉLLO   Anna.") == spoken(tokenizer, "hello anna.")


@pytest.mark.parametrize(
    ("digits", "words"),
    [("7", "seven"), ("10", "ten"), ("14", "fourteen"), ("30", "thirty"), ("99", "ninety nine")],
)
def test_numbers_up_to_99_are_read_as_words(tokenizer, digits, words):
    assert spoken(tokenizer, f"the number is {digits}.") == spoken(
        tokenizer, f"the number is {words}."
    )


def test_longer_numbers_are_read_digit_by_digit(tokenizer):
    assert spoken(tokenizer, "205.") == spoken(tokenizer, "two zero five.")


@pytest.mark.parametrize(
    "text",
    [
        "Strange phonemes, nightly cakes and a xylophone",
        'Müller & Söhne: "25 % (approx.)" — €5/kg…',
        "user.assistant_system",
        "Hallo, dies ist ein Test.",
        "今天的天气很好 ok",
        "One.\nTwo.",
    ],
)
def test_any_text_becomes_known_symbols(tokenizer, text):
    names = [NAME_OF_ID[each] for each in tokenizer.encode(text)]
    assert names
    assert all(name in SYMBOLS for name in names)


def test_unknown_words_are_read_by_their_letters(tokenizer):
    assert spoken(tokenizer, "shibe.") == "ʃˈIb."


def test_marks_inside_a_text_are_short_pauses(tokenizer):
    assert spoken(tokenizer, "one... two; three!?") == spoken(tokenizer, "one, two, three!?")


def test_the_fixed_texts_of_a_prompt_are_one_id_each(tokenizer):
    system = "Generate audio following instruction.\n\n"
    assert len(tokenizer.encode(system)) == 2
    assert len(tokenizer.encode("\nAudio is recorded from a quiet room.\n")) == 3


def test_the_sentence_of_the_default_scene_can_still_be_spoken(tokenizer):
    ids = tokenizer.encode("Audio is recorded from a quiet room.")
    assert len(ids) > 20


def test_no_text_gives_the_unknown_id(tokenizer):
    everything = "".join(chr(code) for code in (*range(1, 0x2FF), *range(0xE000, 0xE010)))
    assert TOKEN_ID[UNKNOWN] not in tokenizer.encode(everything)


def test_ids_of_symbols_are_consecutive():
    assert [TOKEN_ID[symbol] for symbol in SYMBOLS] == list(
        range(FIRST_SYMBOL_ID, FIRST_SYMBOL_ID + len(SYMBOLS))
    )


def test_the_prompt_is_the_one_that_the_engine_builds(tmp_path):
    from training.export import lm_config
    from vllm.prompts.higgs_audio import HiggsAudioPromptBuilder
    from vllm.prompts.interface import Voice

    write_tokenizer(tmp_path, LEXICON)
    builder = HiggsAudioPromptBuilder(TextTokenizer.from_folder(tmp_path), lm_config(num_layers=1))
    built = builder.build("This is a test", Voice("en_woman", "Woman"))
    symbols = split(" ".join(LEXICON[word] for word in ("this", "is", "a", "test")) + ".")
    assert built.token_ids.tolist() == [*PREFIX, *(TOKEN_ID[each] for each in symbols), *SUFFIX]
