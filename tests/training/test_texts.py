import numpy as np
import pytest

from training.alphabet import SYMBOL_ID, SYMBOLS, from_teacher, split, to_teacher
from training.lexicon import load_lexicon
from training.text import FINAL_KINDS, KINDS, TextSource, all_words, load_vocabulary, spell


@pytest.fixture(scope="module")
def lexicon():
    return load_lexicon()


def source(seed: int) -> TextSource:
    return TextSource(np.random.default_rng(seed), load_vocabulary(), ["zebra", "quartz"])


def test_a_stressed_vowel_is_one_symbol():
    assert split("həlˈO.") == ["h", "ə", "l", "ˈO", "."]


def test_phonemes_survive_the_way_to_the_teacher_and_back():
    phonemes = "JˈUzəɹ ɹˈEd"
    assert to_teacher(phonemes) == "jˈuzəɹ ɹˈid"
    assert from_teacher(to_teacher(phonemes)) == phonemes


def test_secondary_stress_is_dropped():
    assert from_teacher("sˌʌmθˌɪŋ") == "sʌmθɪŋ"


def test_a_phoneme_that_the_alphabet_lacks_is_told():
    assert from_teacher("lɔx") is None


def test_no_lower_case_vowel_letter_is_a_phoneme():
    assert not set("aeiouy") & set(SYMBOLS)


def test_every_word_of_the_vocabulary_is_in_the_lexicon_and_spoken_in_known_symbols(lexicon):
    assert all_words() == set(lexicon)
    assert all(symbol in SYMBOL_ID for each in lexicon.values() for symbol in split(each))


def test_equal_seeds_draw_equal_texts():
    first, second, other = (source(seed) for seed in (1, 1, 2))
    drawn = [first.draw() for _ in range(20)]
    assert drawn == [second.draw() for _ in range(20)]
    assert drawn != [other.draw() for _ in range(20)]


def test_all_kinds_are_drawn_and_can_be_spelt(lexicon):
    spellings = lexicon | {"zebra": "zˈEbɹə", "quartz": "kwˈɔɹts"}
    texts = source(0)
    kinds = set()
    for _ in range(300):
        text, kind = texts.draw()
        kinds.add(kind)
        assert spell(text, spellings)[-1] in ".?!"
    assert kinds == set(KINDS)


def test_the_last_texts_are_mostly_sentences():
    texts = TextSource(np.random.default_rng(0), load_vocabulary(), ["zebra"], kinds=FINAL_KINDS)
    kinds = [texts.draw()[1] for _ in range(300)]
    assert kinds.count("sentence") > 150
    assert set(kinds) == set(FINAL_KINDS)


def test_marks_stand_right_after_their_words(lexicon):
    assert spell("one , two .", lexicon) == f"{lexicon['one']}, {lexicon['two']}."


def test_a_word_without_phonemes_is_refused(lexicon):
    with pytest.raises(KeyError, match="xylophone"):
        spell("the xylophone .", lexicon)
