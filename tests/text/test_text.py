"""Tokenizers: what goes in comes out, whatever it is, and files are what they claim to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvtool.core import machine
from kvtool.core.text import tokenizer as text
from kvtool.core.text.tokenizer import BOS, EOS, KINDS, PAD, SPECIALS, UNK, Tokenizer, guess_kind
from kvtool.errors import CapacityError, FileError, UsageError

TEXTS = ["the cat sat on the mat.", "a b\tc", 'naïve <pad> "quotes" 日本語 🙂', "don't"]
ALL_BYTES = 256

steady = settings(derandomize=True, deadline=None, database=None)
any_text = st.text() | st.text(st.sampled_from("<pad>bos/eunk \r\n\x00🙂é日"))


def trained(kind: str, specials: bool = True) -> Tokenizer:
    return Tokenizer.train(kind, TEXTS, 300, specials)


TOKENIZERS = {kind: trained(kind) for kind in KINDS} | {"bpe alone": trained("bpe", False)}
every_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)
every_kind = pytest.mark.parametrize("kind", KINDS)


# There and back


@pytest.mark.parametrize("name", ["bpe", "bpe alone"])
@steady
@given(any_text)
@example("<pad><bos><eos><unk> <pad>")
@example("\ufeffBOM, \x00 and \r\n\r and \x85\u2028")
@example("👩‍👩‍👧‍👦 e\u0301 \ufffd \U0010ffff")
def test_byte_level_bpe_loses_nothing_of_any_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode_batch(["x", text])[1]) == text


@steady
@given(any_text.filter(bool))
def test_a_char_tokenizer_gives_back_any_text_of_the_characters_that_it_has_seen(text: str) -> None:
    tokenizer = Tokenizer.train("char", [text[::-1]])
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text


@steady
@given(st.lists(st.text("abAB01<>/é日🙂", min_size=1), min_size=1))
def test_symbols_come_back_with_one_blank_between_them(symbols: list[str]) -> None:
    tokenizer = Tokenizer.train("symbol", [" ".join(symbols)])
    ids = tokenizer.encode("\t" + "  ".join(symbols) + "\n")
    assert len(ids) == len(symbols) and tokenizer.decode(ids) == " ".join(symbols)


def test_words_and_punctuation_come_back_as_tokens_of_their_own() -> None:
    tokenizer = Tokenizer.train("word", ["the cat's here, isn't it?"])
    text = "the  cat isn't here?"
    assert tokenizer.pieces(tokenizer.encode(text)) == ["the", "cat", "isn", "'", "t", "here", "?"]
    assert tokenizer.decode(tokenizer.encode(text)) == "the cat isn ' t here ?"


# Special tokens


@every_kind
def test_a_tokenizer_with_special_tokens_begins_with_them(kind: str) -> None:
    tokenizer = trained(kind)
    assert tokenizer.kind == kind and tokenizer.has_specials
    assert (PAD, BOS, EOS, UNK) == (0, 1, 2, 3) and tokenizer.eos_id == EOS
    assert len(tokenizer.pieces(range(4, tokenizer.vocab_size))) == tokenizer.vocab_size - 4


def test_a_tokenizer_without_special_tokens_marks_no_end() -> None:
    tokenizer = TOKENIZERS["bpe alone"]
    assert not tokenizer.has_specials and tokenizer.eos_id is None
    assert tokenizer.decode(tokenizer.encode('!"#$')) == '!"#$'  # the bytes of ids 0 to 3


@every_tokenizer
@pytest.mark.parametrize("text", SPECIALS)
def test_text_that_spells_a_special_token_is_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    for ids in (tokenizer.encode(f"{text} a"), tokenizer.encode_batch([f"{text} a"])[0]):
        assert (ids and not {PAD, BOS, EOS} & set(ids)) or not tokenizer.has_specials
        assert tokenizer.decode(ids).endswith("a")


@every_kind
def test_special_tokens_and_ids_that_are_not_in_the_vocabulary_have_no_text(kind: str) -> None:
    tokenizer = trained(kind)
    ids = tokenizer.encode("a b")
    beyond = tokenizer.vocab_size + 7
    assert tokenizer.decode([BOS, *ids, beyond, EOS, PAD, PAD]) == tokenizer.decode(ids)
    assert tokenizer.pieces([BOS, *ids, EOS]) == tokenizer.pieces(ids)
    assert tokenizer.pieces([beyond]) == [""]


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [("char", "aбb", 1), ("symbol", "a z b", 1), ("word", "the dog sat", 1), ("bpe", "б", None)],
)
def test_what_was_never_seen_is_unknown_but_for_bytes(
    kind: str, text: str, expected: int | None
) -> None:
    ids = trained(kind).encode(text)
    assert (ids.index(UNK) if UNK in ids else None) == expected
    missing = {"char": ["б"], "symbol": ["z"], "word": ["dog"], "bpe": []}
    assert trained(kind).unknown(f"{text} {text}") == missing[kind]


# Streaming


@every_tokenizer
def test_a_batch_is_encoded_in_parts_between_which_signals_are_heard(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, heard = TOKENIZERS[name], []
    monkeypatch.setattr(text, "PART", 5)
    asking = Tokenizer._library_call
    monkeypatch.setattr(Tokenizer, "_library_call", lambda *a: heard.append(a) or asking(*a))
    texts = ["the cat", "", "a", "b", "the mat", "sat on"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(each) for each in texts]
    assert len(heard) == 3 + len(texts)


def test_a_text_that_memory_has_no_room_to_encode_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda device: 99 * text.ENCODED_NBYTES)
    text.require_room("--data x", "a" * 99)
    said = r"--data x: the tokens of 50 characters: needs 2.38e-05 GiB"
    with pytest.raises(CapacityError, match=said):
        text.require_room("--data x", "é" * 50)


@every_tokenizer
@steady
@given(st.data())
def test_a_stream_ends_up_with_the_text_of_all_ids(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2)))
    stream = tokenizer.stream()
    shown = [stream.step(i) for i in ids]
    for n in range(len(ids) + 1):
        assert tokenizer.decode(ids[:n]).startswith("".join(shown[:n]))
    assert "".join(shown) + stream.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["bpe", "bpe alone"])
def test_a_character_is_shown_once_and_as_soon_as_it_is_complete(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("é🦉x")
    stream = tokenizer.stream()
    assert [stream.step(i) for i in ids] == ["", "é", "", "", "🦉", "x"]
    assert stream.finish() == ""


def test_an_incomplete_character_is_shown_as_such_at_the_end_only() -> None:
    tokenizer = TOKENIZERS["bpe"]
    ids = tokenizer.encode("x🦉")[:-1]
    stream = tokenizer.stream()
    assert "".join(stream.step(i) for i in ids) == "x"
    assert stream.finish() == "\ufffd" and tokenizer.decode(ids) == "x\ufffd"


# Which kind


@pytest.mark.parametrize(
    ("texts", "kind"),
    [
        (["K AE T", "D AO G"], "symbol"),
        (["cat", "dog", "ice cream", "owl", "cow", "hen"], "char"),
        ([f"word{i} and word{i + 1}" for i in range(300)], "bpe"),
        (["日本語", "東京"], "char"),
        ([], "char"),
    ],
    ids=["phones", "words", "sentences", "without blanks", "nothing"],
)
def test_the_kind_is_guessed_from_how_the_texts_look(texts: list[str], kind: str) -> None:
    assert guess_kind(texts) == kind


# Learning


@every_kind
def test_learning_twice_gives_the_same_tokenizer_and_other_texts_another(kind: str) -> None:
    texts = [f"{i} some {i % 7} text {i * i} b{i}" for i in range(200)]
    fingerprints = {Tokenizer.train(kind, texts, 400).fingerprint for _ in range(5)}
    assert len(fingerprints) == 1
    assert Tokenizer.train(kind, ["more of it"], 400).fingerprint not in fingerprints


def test_the_vocabulary_of_bpe_is_bounded_and_that_of_words_keeps_the_frequent() -> None:
    texts = [" ".join(f"w{i}" for i in range(n)) for n in range(1, 60)]
    assert Tokenizer.train("bpe", texts, 280).vocab_size == 280
    assert Tokenizer.train("word", texts).pieces([4, 5, 6]) == ["w0", "w1", "w2"]


@pytest.mark.parametrize(("specials", "smallest"), [(True, 260), (False, 256)])
def test_a_vocabulary_without_room_for_every_byte_is_refused(specials: bool, smallest: int) -> None:
    with pytest.raises(UsageError, match=rf"--vocab-size: {smallest - 1} .* {smallest} or more"):
        Tokenizer.train("bpe", TEXTS, smallest - 1, specials)
    assert Tokenizer.train("bpe", TEXTS, smallest, specials).vocab_size == smallest


@pytest.mark.parametrize("kind", ["char", "symbol", "word"])
@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_without_any_text_there_is_nothing_to_learn(kind: str, texts: list[str]) -> None:
    with pytest.raises(UsageError, match="no token to learn from"):
        Tokenizer.train(kind, texts)


def test_bytes_need_no_text_to_be_known() -> None:
    tokenizer = Tokenizer.train("bpe", [], specials=False)
    assert tokenizer.vocab_size == ALL_BYTES and tokenizer.decode(tokenizer.encode("é")) == "é"


def test_an_unknown_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"--tokenizer: 'chars' .* Did you mean char\?"):
        Tokenizer.train("chars", TEXTS)


@every_kind
def test_no_text_makes_no_token_and_no_token_no_text(kind: str) -> None:
    tokenizer = trained(kind)
    assert tokenizer.encode("") == tokenizer.encode_batch([]) == tokenizer.pieces([]) == []
    assert tokenizer.decode([]) == tokenizer.stream().finish() == ""


# Files


@every_tokenizer
def test_a_tokenizer_comes_back_from_its_file_as_it_was(name: str, tmp_path: Path) -> None:
    tokenizer, path = TOKENIZERS[name], tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    text = f"{TEXTS[2]} {SPECIALS[0]} б"
    for attribute in ("kind", "fingerprint", "vocab_size", "has_specials", "eos_id"):
        assert getattr(loaded, attribute) == getattr(tokenizer, attribute)
    assert loaded.encode(text) == tokenizer.encode(text)
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_a_file_of_the_library_itself_is_read_with_its_gaps_and_without_its_kind(
    tmp_path: Path,
) -> None:
    foreign = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 9}))
    foreign.save(str(tmp_path / "foreign.json"))
    tokenizer = Tokenizer.load(tmp_path / "foreign.json")
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id) == ("other", 10, None)
    assert tokenizer.encode("b") == [9]
    with pytest.raises(UsageError, match="cannot be encoded"):
        tokenizer.encode("c")


def truncated(text: str) -> str:
    return text[: len(text) // 2]


def without_model(text: str) -> str:
    return json.dumps({**json.loads(text), "model": None})


def without_vocabulary(text: str) -> str:
    spec = json.loads(text)
    spec["model"]["vocab"] = {}
    return json.dumps(spec)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated, "is not a tokenizer"),
        (without_model, "is not a tokenizer"),
        (without_vocabulary, "a tokenizer"),
        (lambda _: '{"model_type": "kvtool-decoder"}', "is not a tokenizer"),
        (lambda _: "[]", "is not a tokenizer"),
        (lambda _: "", "0 bytes"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_by_name(
    damage: Callable[[str], str], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    trained("word").save(path)
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(FileError, match=rf"tokenizer\.json: .*{said}"):
        Tokenizer.load(path)


def test_a_missing_tokenizer_and_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="not found"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_bytes(b"{\xff}")
    with pytest.raises(FileError, match="byte 0xff at offset 1"):
        Tokenizer.load(tmp_path / "tokenizer.json")
