"""The steps for words without pieces: what each does, and that it changes nothing else."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from bert_fast.cli import app
from bert_fast.embedder import Embedder
from bert_fast.folders import resolve
from bert_fast.ladder import Ladder, read_entities, read_names
from bert_fast.tokenization import Tokenizer, bert_backend
from bert_fast.verify import shipped_sentences

#: A vocabulary with gaps: no "##b", no Chinese, no snow man.
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = ["snow", "##man", "man", "the", "##abc", "tokyo", "tower"]
TOKENS = [*SPECIAL, *"abcdsnow-.", *(f"##{character}" for character in "acdsnow"), *PIECES]


def backend(tokens=TOKENS):
    return bert_backend({token: id for id, token in enumerate(tokens)}, {})


def tokens_of(tokenizer, text, max_length=None):
    batch = tokenizer([text], max_length)
    return " ".join(map(tokenizer.backend.id_to_token, batch.input_ids.tolist())), batch


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("snowman a", "snow ##man a"),  # sub-words do: nothing is spelled
        ("ab", "a [UNK]"),  # b has no token inside a word
        ("sonda", "s ##o ##n ##d ##a"),  # has pieces anyway
        ("snow☃man", "s ##n ##o ##w [UNK] ##a ##n"),  # neither ☃ nor ##m; a run of missing ones is one
        ("☃☄", "[UNK]"),
        ("☃☄a", "[UNK] ##a"),
        ("[UNK] [MASK] a", "[UNK] [MASK] a"),
        ("東 a", "[UNK] a"),
        ("SNÖW☃", "s ##n ##o ##w [UNK]"),
    ],
)
def test_spelling(text, expected):
    spelled, batch = tokens_of(Tokenizer(backend(), unknown="characters"), text)
    assert spelled == f"[CLS] {expected} [SEP]"
    assert batch.num_unknown == expected.split().count("[UNK]")


def test_a_word_longer_than_wordpiece_takes_is_spelled():
    tokenizer = Tokenizer(backend(), unknown="characters")
    assert tokens_of(Tokenizer(backend()), "a" * 101)[0] == "[CLS] [UNK] [SEP]"
    assert tokens_of(tokenizer, "a" * 101)[0].split() == ["[CLS]", "a", *["##a"] * 100, "[SEP]"]


ENTITIES = {"☃": "snowman", "東京 タワー": "Tokyo tower", "東京": "tokyo", "the ☄": "man", "snow": "a"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a ☃.", "a snow ##man ."),
        ("a☃a", "[UNK]"),  # not the word ☃
        ("東京 タワー.", "tokyo tower ."),  # the longest mention wins
        ("東京", "tokyo"),
        ("東京a", "tokyo a"),
        ("The ☄", "man"),  # as the tokenizer normalises
        ("the", "the"),  # only with an unknown word in it
        ("snow ☄", "snow [UNK]"),  # known words are left alone
        ("[MASK] ☃", "[MASK] snow ##man"),
    ],
)
def test_entities(text, expected):
    assert tokens_of(Tokenizer(backend(), entities=ENTITIES), text)[0] == f"[CLS] {expected} [SEP]"


def test_spelling_goes_before_entities():
    both = Tokenizer(backend(), unknown="characters", entities={"a" * 101: "man", "a☃": "the"})
    assert tokens_of(both, "a" * 101)[0].count("##a") == 100
    assert tokens_of(both, "a☃")[0] == "[CLS] the [SEP]"  # spelled it would still have an unknown character


def test_pairs():
    tokenizer = Tokenizer(backend(), unknown="characters", entities=ENTITIES)
    batch = tokenizer([("the ☃", "sn☄ 東京"), ("the", "a")])
    tokens = " ".join(tokenizer.backend.id_to_token(id) for id in batch.input_ids)
    assert tokens == "[CLS] the snow ##man [SEP] s ##n [UNK] tokyo [SEP] [CLS] the [SEP] a [SEP]"
    assert batch.token_type_ids.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1]
    assert batch.lengths.tolist() == [10, 5]
    assert batch.num_unknown == 1


def test_truncation_counts_the_tokens_after_the_ladder():
    tokenizer = Tokenizer(backend(), unknown="characters", entities={"☄": "the"})
    text, batch = tokens_of(tokenizer, "snow☃ a", 6)
    assert text == "[CLS] s ##n ##o ##w [SEP]"
    assert batch.num_truncated == 1
    assert batch.num_unknown == 0  # what was cut off is not there
    text, batch = tokens_of(tokenizer, "snow☃ a", 8)
    assert text == "[CLS] s ##n ##o ##w [UNK] a [SEP]"
    assert batch.num_truncated == 0


class Always(Ladder):
    """Sends every text through the ladder."""

    def _has_unknown(self, encoding):
        return True


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text("abcdnosw [MASK]-é", max_size=20), min_size=2, max_size=2),
    st.booleans(),
    st.integers(4, 24),
)
def test_the_way_through_the_ladder_is_the_librarys_for_known_words(texts, pair, max_length):
    """Ids, types and truncation of texts that need no step, put through it all the same."""
    tokens = [*TOKENS, "##b", "e", "##e", "[", "]", "m", "k", "##m", "##k"]
    plain, forced = Tokenizer(backend(tokens)), Tokenizer(backend(tokens), unknown="characters")
    forced._ladder = Always(forced.backend, spell=True, entities={"never": "seen"})
    given = [tuple(texts)] if pair else texts
    expected, found = plain(given, max_length), forced(given, max_length)
    for name in ("input_ids", "token_type_ids", "lengths", "truncated"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab☃☄ snow東京"), max_size=16))
def test_no_step_adds_unknown_words(text):
    """Nothing changes in a text without unknown words, and entities leave no more of them than there were."""
    plain = Tokenizer(backend())([text])
    mapped = Tokenizer(backend(), entities=ENTITIES)([text])
    assert mapped.num_unknown <= plain.num_unknown
    spelled = Tokenizer(backend(), unknown="characters")([text])
    if plain.num_unknown == 0:
        assert spelled.input_ids.tolist() == mapped.input_ids.tolist() == plain.input_ids.tolist()


def test_the_default_is_what_it_was_and_counts():
    tokenizer = Tokenizer.from_pretrained(resolve("demo"))
    batch = tokenizer(["a ☃ and ✈", "nothing"])
    assert batch.num_unknown == 2
    assert batch.select(np.array([1])).num_unknown == 0
    assert tokenizer._ladder is None


def test_the_real_vocabulary():
    options = {"unknown": "characters", "entities": {"☃": "snowman"}}
    tokenizer = Tokenizer.from_pretrained(resolve("demo"), **options)
    sentences = shipped_sentences()
    plain = Tokenizer.from_pretrained(resolve("demo"))(sentences)
    assert tokenizer(sentences).num_unknown <= plain.num_unknown
    assert tokenizer(["The ☃ melts."]).input_ids.tolist() == tokenizer(["The snowman melts."]).input_ids.tolist()
    assert tokenizer(["caf☃e"]).num_unknown == 1


def test_the_embedder_and_its_command(tmp_path):
    (tmp_path / "entities.tsv").write_text("☃\tsnowman\n")
    (tmp_path / "texts.txt").write_text("A ☃ melts.\n")
    options = [
        "--input",
        tmp_path / "texts.txt",
        "--output",
        tmp_path / "v.npy",
        "--entities",
        tmp_path / "entities.tsv",
    ]
    result = CliRunner().invoke(app, ["embed", "demo", *map(str, options), "--unknown", "characters"])
    assert result.exit_code == 0, result.output
    assert "[UNK]" not in result.stdout
    expected = Embedder("demo").encode(["A snowman melts."])
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), expected)
    np.testing.assert_array_equal(Embedder("demo", entities={"☃": "snowman"}).encode(["A ☃ melts."]), expected)
    result = CliRunner().invoke(app, ["embed", "demo", *map(str, options[:4])])
    assert "7 tokens, 1 of them [UNK], in" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unknown": "guess"}, "unknown is 'guess', expected one of unk, characters"),
        ({"entities": {"": "a"}}, "neither may be empty"),
        ({"entities": {"a": " "}}, "neither may be empty"),
        ({"entities": {"Tokyo ☃": "a", "tokyo  ☃": "b"}}, "'tokyo  ☃' is to be 'b' and"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(backend(), **options)


def test_only_wordpiece():
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    assert Tokenizer(other)(["a b"]).num_unknown == 1
    with pytest.raises(ValueError, match="is a WordLevel, expected WordPiece"):
        Tokenizer(other, unknown="characters")


def test_entities_of_a_file(tmp_path):
    path = tmp_path / "entities.tsv"
    path.write_bytes("\ufeff☃\tsnowman\r\n\r\n東京 タワー\tTokyo tower\n".encode())
    assert read_entities(path) == {"☃": "snowman", "東京 タワー": "Tokyo tower"}
    assert read_names(path) == ["☃", "東京 タワー"]


def test_names_of_a_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes(b"\xef\xbb\xbfNew York\r\n\n city \nIthaca\tanother city\n")
    assert read_names(path) == ["New York", "city", "Ithaca"]
    path.write_bytes(b"\n")
    with pytest.raises(ValueError, match=r"names\.txt holds no names"):
        read_names(path)
    path.write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match=r"names\.txt, line 2 is not UTF-8"):
        read_names(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\tb\nno tab\n", "line 2 is 'no tab'"),
        (b"a\tb\tc\n", "line 1 is"),
        (b"\tb\n", "line 1 is"),
        (b"a\tb\na\tc\n", "line 2 has 'a' again"),
        (b"a\tb\n\xff\tc\n", "line 2 is not UTF-8"),
    ],
)
def test_bad_files_of_entities(tmp_path, content, message):
    path = tmp_path / "entities.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_entities(path)
