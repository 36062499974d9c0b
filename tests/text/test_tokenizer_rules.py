"""A tokenizer.json is a program by whoever wrote it: it is followed within bounds, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch

from kvtool.core.checkpoint import checkpoint
from kvtool.core.text.rules import LONGEST_TOKEN
from kvtool.core.text.tokenizer import Tokenizer
from kvtool.errors import FileError, UsageError
from small_models import save_decoder
from tokenizer_cases import (
    A_TEXT,
    METASPACE,
    SPEC,
    TEXT,
    Spec,
    added,
    charsmap,
    decoded,
    model,
    normalized,
    padding,
    replace,
    special,
    specials,
    split_by,
    template,
    truncation,
    vocabulary,
    written,
)

# What is refused before it runs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (normalized(*[replace("a", "a" * 1000)] * 4), "its rules make more than 10^9 characters"),
        (normalized(*[replace(".", "aa", "Regex")] * 30), "its rules make more than 10^9"),
        ({"normalizer": replace("a", "b" * 300)}, "its rules make 1,200 characters of one"),
        (normalized({"type": "Prepend", "prepend": "a" * 1000}), "its rules make 4,004 characters"),
        (normalized(*[{"type": "ByteLevel"}] * 9), "its rules make 1,048,576 characters"),
        (charsmap(b"\0" * 64, b"x" * 5000 + b"\0"), "its rules make 20,000 characters of one"),
        (split_by(*[SPEC["pre_tokenizer"]] * 9), "its rules make 1,048,576 characters of one"),
        (split_by(*[METASPACE] * 9), "its rules make 2,048 characters of one (expected 256 or"),
        (decoded(*[replace("", "x" * 9)] * 9), "characters of one that is decoded (expected 16"),
        (decoded(*[{"type": "BPEDecoder", "suffix": ""}] * 9), "its rules make 2,048 characters"),
        (template(*[A_TEXT] * 1000), "its template has the text 1,000 times (expected once)"),
        (template(special()), "its template has the text 0 times (expected once)"),
        (template(*[special()] * 90, A_TEXT, ids=(1,) * 90), "its rules make 8,100 tokens around"),
        (added("z" * 5000), "has a token of 5,000 characters (expected 4,096 or fewer)"),
        (specials(20_000, "<{}>"), "has 20,000 special tokens of 128,890 characters (expected 16,"),
        (specials(300, "z" * 4000 + "{}"), "has 300 special tokens of 1,200,790 characters"),
        (vocabulary(zz=70, yy=70), "several tokens have the id 70 (expected one)"),
        (model(end_of_word_suffix="x" * 99), "end_of_word_suffix has 99 characters (expected 64"),
        (
            {
                "model": {
                    "type": "WordPiece",
                    "vocab": {"a": 0},
                    "unk_token": "a",
                    "continuing_subword_prefix": "##",
                    "max_input_chars_per_word": 10**9,
                },
                "added_tokens": [],
            },
            "max_input_chars_per_word is 1,000,000,000 (expected 1,000 or less)",
        ),
        (charsmap(b"", b"", size=2**31), "is not a tokenizer (Precompiled"),
        (model(continuing_subword_prefix="x" * 999), "is not a tokenizer (range end index"),
        ({"truncation": {"a": 1}}, "is not a tokenizer (missing field"),
    ],
)
def test_rules_that_could_make_too_much_of_a_text_are_refused_unrun(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], change: Spec, message: str
) -> None:
    path = written(tmp_path, change)
    with pytest.raises(FileError) as caught:
        Tokenizer.load(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"version"', '"truncation": null, "version"', "truncation occurs twice"),
        ('"normalizer": null', f'"normalizer": {"[" * 9**5}', "it is nested too deeply"),
        ('"version": "1.0"', f'"version": {"9" * 5000}', "is a number of 5,000 digits"),
    ],
)
def test_a_tokenizer_that_is_no_json_of_one_meaning_is_refused(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    path = written(tmp_path, {})
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(FileError, match=message):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    "change",
    [
        normalized(
            replace("``", '"'),
            {"type": "NFKD"},
            {"type": "StripAccents"},
            {"type": "Lowercase"},
            replace(" {2,}", " ", "Regex"),
        ),
        normalized({"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")),
        split_by({"type": "Digits", "individual_digits": True}),
        template(special(), A_TEXT, special()),
        decoded({"type": "Strip", "content": " ", "start": 1, "stop": 0}, replace("▁", " ")),
    ],
    ids=["ALBERT", "Llama 2", "digits", "BERT", "decoders"],
)
def test_rules_as_models_have_them_are_followed(tmp_path: Path, change: Spec) -> None:
    path = written(tmp_path, change)
    foreign = tokenizers.Tokenizer.from_file(str(path))
    tokenizer = Tokenizer.load(path).as_it_is(frozenset())
    assert tokenizer.encode(TEXT) == foreign.encode(TEXT).ids
    assert tokenizer.left_out == ()


# What is refused before the library reads the vocabulary


def unigram(names: list[str]) -> Spec:
    return {"model": {"type": "Unigram", "unk_id": 0, "vocab": [[name, -1.0] for name in names]}}


LONG = [f"{i:03}{'z' * 4000}" for i in range(600)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            unigram(LONG),
            "its tokens are too many or too long for Unigram (they have more than",
        ),
        (unigram(["z" * 5000]), "has a token of 5,000 characters (expected 4,096 or fewer)"),
        (vocabulary(**{"z" * 5000: 900}), "has a token of 5,000 characters"),
        (added("z" * 5000), "has a token of 5,000 characters"),
        (specials(1100, "z" * 4000 + "{}"), "make 4,403,290 characters of its added tokens (exp"),
        (
            {**specials(400, "a" * 200 + "{}"), "normalizer": replace("a", "b" * 63)},
            "its rules make 5,108,670 characters of its added tokens (expected 2,097,152 or fewer)",
        ),
        (unigram(["\ud800"]), "its vocabulary is damaged: UnicodeEncodeError"),
        ({"model": {"type": "Unigram", "vocab": [7]}}, "its vocabulary is damaged: TypeError"),
        ({"added_tokens": [{}]}, "its vocabulary is damaged: KeyError 'content'"),
    ],
)
def test_a_vocabulary_too_large_for_the_library_never_reaches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Spec, message: str
) -> None:
    read: list[str] = []
    real = tokenizers.Tokenizer.from_str

    class Watched:
        @staticmethod
        def from_str(text: str) -> tokenizers.Tokenizer:
            read.append(text)
            return real(text)

    monkeypatch.setattr(tokenizers, "Tokenizer", Watched)
    with pytest.raises(FileError) as caught:
        Tokenizer.load(written(tmp_path, change))
    assert message in str(caught.value)
    assert all(len(json.loads(text)["model"]["vocab"]) == 0 for text in read)


def test_a_unigram_vocabulary_of_a_quarter_of_a_million_tokens_is_read(tmp_path: Path) -> None:
    names = [f"\u2581{i:x}" for i in range(250_000)]  # more than 2^21 bytes, fewer beginnings
    path = written(tmp_path, {**unigram(names), "added_tokens": []})
    assert Tokenizer.load(path).vocab_size == 250_000


# What is for batches in training


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (truncation(3), ("truncation",)),
        (truncation(3, stride=9), ("truncation",)),  # which the library panics at
        (padding(60_000_000), ("padding",)),
        ({**padding(50), **truncation(3)}, ("truncation", "padding")),
        (model(dropout=0.9), ("dropout",)),
    ],
)
def test_what_is_for_batches_in_training_is_left_out(
    tmp_path: Path, change: Spec, named: tuple[str, ...]
) -> None:
    tokenizer = Tokenizer.load(written(tmp_path, change))
    plain = Tokenizer.load(written(tmp_path / "plain", {}))
    assert tokenizer.left_out == named and plain.left_out == ()
    assert tokenizer.encode(TEXT) == plain.encode(TEXT)
    assert tokenizer.encode_batch([TEXT, "a"]) == plain.encode_batch([TEXT, "a"])


def test_sampling_of_pieces_is_left_out() -> None:
    pieces = [("a", -1.0), ("aa", -1.5), ("aaa", -2.0)]
    unigram = tokenizers.models.Unigram(pieces, alpha=0.1, nbest_size=9)
    tokenizer = Tokenizer(tokenizers.Tokenizer(unigram))
    tokenizer._take_rules(Path("tokenizer.json"))
    assert tokenizer.left_out == ("alpha", "nbest_size")
    assert len({tuple(tokenizer.encode("a" * 30)) for _ in range(20)}) == 1


def load(folder: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(str(folder), torch.device("cpu"), torch.float32)


def change_tokenizer(folder: Path, change: Spec) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return path


def test_what_is_left_out_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_decoder(tmp_path)
    path = change_tokenizer(folder, {**padding(50), **truncation(3)})
    with caplog.at_level("INFO", "kvtool"):
        load(folder)
    said = "its truncation and padding, for batches in training, will not be done"
    assert caplog.messages == [f"{path}: {said}"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (template(special(), A_TEXT, ids=(10**6,)), "its template"),
        (
            {"post_processor": {"type": "BertProcessing", "sep": ["x", 10**6], "cls": ["y", 1]}},
            "its template",
        ),
        (
            {
                "post_processor": {
                    "type": "Sequence",
                    "processors": [
                        {
                            "type": "RobertaProcessing",
                            "sep": ["x", 1],
                            "cls": ["y", 10**6],
                            "trim_offsets": True,
                            "add_prefix_space": False,
                        }
                    ],
                }
            },
            "its template",
        ),
        (padding(9, pad_id=10**6), "its padding"),
    ],
)
def test_ids_of_rules_beyond_the_embedding_are_refused_at_load(
    tmp_path: Path, change: Spec, what: str
) -> None:
    folder = save_decoder(tmp_path)
    path = change_tokenizer(folder, change)
    with pytest.raises(FileError) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{path}: {what} has the token 1000000 (expected one below")


# What we write ourselves is within the bounds


def test_no_tokenizer_of_ours_has_a_token_that_it_would_refuse(tmp_path: Path) -> None:
    long = "ab" * LONGEST_TOKEN * 4
    tokenizer = Tokenizer.train("bpe", [long], 400)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    longest = max(map(len, loaded.pieces(range(loaded.vocab_size))))
    assert LONGEST_TOKEN // 4 < longest <= LONGEST_TOKEN
    with pytest.raises(UsageError, match="a token of 32,768 characters, 'abab"):
        Tokenizer.train("word", [long])
