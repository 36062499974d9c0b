"""Tokenizers of GGUF files: the ids that llama.cpp itself gives, for texts of every kind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from gguf_files import Made, byte_level
from kvtool.core.checkpoint.gguf import tokens as gguf_tokens
from kvtool.core.checkpoint.gguf.header import GGUFHeader
from kvtool.core.checkpoint.gguf.tokens import read_template, read_tokenizer
from kvtool.core.servers.client import Client
from kvtool.core.servers.engines import connect
from kvtool.core.text.tokenizer import Tokenizer
from kvtool.errors import FileError, UsageError
from llama_server import llama_server

PLAIN = "the cat sat on the mat 1 22 333 4444 3.14 don't I'll WE'VE O'Neil naïve Ünïcode MixedCase"
OTHERS = "中文字 日本語テスト 한국어 العربية हिन्दी ไทย 🙂 👩\u200d👩\u200d👧 <b> f(x): \t \n \n\n"
SIGNS = "\r\n \u00a0 \u2003 \u200b ½ ² Ⅻ ٣ -- == $100 `x` ~ ^ | a/b/ ...\n !? \u0301e"
WORDS = f"{PLAIN} {OTHERS} {SIGNS}".split(" ")
SPECIALS = ["<|end|>", "<|im_end|>", "<user>"]
FILES = Callable[[Callable[[gguf.GGUFWriter], None]], Path]


def texts(n: int, seed: int) -> list[str]:
    """Words in a row, words with blanks and line breaks of every kind, and any characters; without
    special tokens, which llama.cpp reads as such."""
    drawn, found = random.Random(seed), []
    blanks = ["", " ", "  ", "\n", " \n ", "\t", "   \n\n"]
    for i in range(n):
        if i % 3:
            parts = [
                w + drawn.choice(blanks[: 1 + 3 * (i % 3)]) for w in drawn.choices(WORDS, k=25)
            ]
            found.append("".join(parts))
        else:
            ranges = (
                (32, 126),
                (160, 0x2FFF),
                (0x3000, 0xD7FF),
                (0xE000, 0xFFFD),
                (2**16, 0x1FFFF),
            )
            codes = [drawn.randint(*drawn.choice(ranges)) for _ in range(30)]
            found.append("".join(map(chr, codes)))
    return found


@pytest.fixture(scope="module")
def learned() -> tuple[list[str], list[str]]:
    """A vocabulary and merges that go across words, so that only splitting keeps them apart."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts(300, seed=1), trainer)
    model = json.loads(inner.to_str())["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    return [*SPECIALS, *sorted(model["vocab"], key=model["vocab"].get)], merges


@pytest.fixture
def file_with(tmp_path: Path) -> FILES:
    def write(tokenizer: Callable[[gguf.GGUFWriter], None], n: int = 1203) -> Path:
        made = Made(tokenizer=tokenizer, n_layers=1, vocab=n, formats=("F32",))
        return made.write(tmp_path / "a.gguf")

    return write


def of_llama_cpp(path: Path, given: list[str]) -> list[list[int]]:
    pytest.importorskip("xllamacpp")
    with llama_server(path) as url:
        engine = connect(Client(url))
        return [engine.tokenize(text) for text in given]


def as_bytes(tokens: list[str], merges: list[str], pre: str) -> Callable[[gguf.GGUFWriter], None]:
    return partial(byte_level, tokens=tokens, pre=pre, merges=merges, special=SPECIALS)


@pytest.mark.parametrize("pre", gguf_tokens.SPLITS)
def test_ids_are_those_of_llama_cpp(
    pre: str, learned: tuple[list[str], list[str]], file_with: FILES
) -> None:
    path = file_with(as_bytes(*learned, pre))
    tokenizer, given = read_tokenizer(GGUFHeader(path)), texts(150, seed=2)
    found = [tokenizer.encode(text) for text in given]
    expected = of_llama_cpp(path, given)
    differ = [(t, a, b) for t, a, b in zip(given, found, expected, strict=True) if a != b]
    assert not differ, (len(differ), differ[0])
    assert [tokenizer.decode(ids) for ids in found[1:3]] == given[1:3] or pre in BEGUN


BEGUN = gguf_tokens.WHOLE_WORDS  # with a token of the file's before the text


def test_splitting_decides_the_ids(learned: tuple[list[str], list[str]], file_with: FILES) -> None:
    """Or the test above would hold for any of them."""
    given, found = texts(150, seed=2), {}
    for pre in gguf_tokens.SPLITS:
        tokenizer = read_tokenizer(GGUFHeader(file_with(as_bytes(*learned, pre))))
        begun = 1 if pre in BEGUN else 0
        found[pre] = [tokenizer.encode(text)[begun:] for text in given]
    for pre, ids in found.items():
        assert all(ids != other for name, other in found.items() if name != pre), pre


def sentencepiece(writer: gguf.GGUFWriter) -> None:
    """The fields of a tokenizer as Llama 2's: pieces with scores, and bytes for all else."""
    inner = tokenizers.Tokenizer(models.BPE())
    blank = gguf_tokens.BLANK
    trainer = trainers.BpeTrainer(
        vocab_size=900, limit_alphabet=300, show_progress=False, max_token_length=8
    )
    inner.train_from_iterator([t.replace(" ", blank) for t in texts(200, seed=3)], trainer)
    vocab = inner.get_vocab()
    pieces = sorted(vocab, key=vocab.__getitem__)
    many = [p for p in pieces if len(p) > 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *many]
    tokens += [p for p in pieces if len(p) == 1]
    rank = {p: -float(i) for i, p in enumerate(tokens[259:])}
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([rank.get(t, 0.0) for t in tokens])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


def test_ids_of_sentencepiece_are_those_of_llama_cpp(file_with: FILES) -> None:
    path = file_with(sentencepiece, 1159)
    tokenizer = read_tokenizer(GGUFHeader(path))
    given = texts(150, seed=4)
    found, expected = [tokenizer.encode(text) for text in given], of_llama_cpp(path, given)
    differ = [(t, a, b) for t, a, b in zip(given, found, expected, strict=True) if a != b]
    assert not differ, (len(differ), differ[0])
    assert all(ids[0] == 1 for ids in found)
    assert tokenizer.decode(found[1][1:]) == given[1]


def with_fields(
    learned: tuple[list[str], list[str]], pre: str = "gpt-2", **more: object
) -> Callable[[gguf.GGUFWriter], None]:
    def write(writer: gguf.GGUFWriter) -> None:
        byte_level(writer, learned[0], pre, learned[1], SPECIALS)
        for name, value in more.items():
            add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
            add[type(value)](name.replace("__", "."), value)  # type: ignore[operator]

    return write


def test_a_kind_that_is_not_there_leaves_ids_and_says_so_when_text_comes(
    learned: tuple[list[str], list[str]], file_with: FILES
) -> None:
    found = read_tokenizer(GGUFHeader(file_with(with_fields(learned, "kimi-k2"))))
    assert found.decode([3, 4]) == "3 4"
    with pytest.raises(FileError, match="splits texts as 'kimi-k2' does, which kvtool does not"):
        found.encode("text")

    def bert(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("bert")
        writer.add_token_list(["a"])

    with pytest.raises(FileError, match="its tokenizer is 'bert', which kvtool does not have"):
        read_tokenizer(GGUFHeader(file_with(bert))).encode("text")


def test_a_text_is_begun_and_ended_as_the_file_asks(
    learned: tuple[list[str], list[str]], file_with: FILES
) -> None:
    asked = {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__add_eos_token": True}
    path = file_with(with_fields(learned, **asked))
    ids = read_tokenizer(GGUFHeader(path)).encode("the cat")
    assert (ids[0], ids[-1]) == (0, 0)
    plain = read_tokenizer(GGUFHeader(file_with(with_fields(learned))))
    assert plain.encode("the cat") == ids[1:-1]


def test_an_answer_ends_where_llama_cpp_ends_it(
    learned: tuple[list[str], list[str]], file_with: FILES
) -> None:
    found = read_tokenizer(
        GGUFHeader(file_with(with_fields(learned, tokenizer__ggml__eot_token_id=2)))
    )
    assert found.end_ids == {0, 1, 2}  # eos, the text <|im_end|>, eot
    assert set(found.special_tokens) == set(SPECIALS)


def test_the_chat_template_comes_with_the_names_of_tokens(
    learned: tuple[list[str], list[str]], file_with: FILES
) -> None:
    source = "{{ bos_token }}{{ messages[0].content }}"
    path = file_with(with_fields(learned, tokenizer__chat_template=source))
    template = read_template(GGUFHeader(path))
    assert (template.source, template.path) == (source, path)
    assert template.variables["bos_token"] == SPECIALS[0]
    with pytest.raises(UsageError, match="has no chat template"):
        read_template(GGUFHeader(file_with(with_fields(learned))))


DAMAGED: dict[str, tuple[Callable[[gguf.GGUFWriter], None], str]] = {}


Fields = Callable[[gguf.GGUFWriter], None]


def damaged(said: str) -> Callable[[Fields], Fields]:
    def keep(write: Fields) -> Fields:
        DAMAGED[write.__name__] = write, said
        return write

    return keep


@damaged("tokens is missing, or no list of texts")
def no_tokens(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")


@damaged("tokens has 'a' twice")
def twice(writer: gguf.GGUFWriter) -> None:
    byte_level(writer, ["a", "b", "a"])


@damaged("bos_token_id is 7 (of 2 tokens)")
def beyond(writer: gguf.GGUFWriter) -> None:
    no_tokens(writer)
    writer.add_token_list(["a", "b"])
    writer.add_token_merges(["a b"])
    writer.add_add_bos_token(True)
    writer.add_bos_token_id(7)


@damaged("scores is not as long as tokens, 2")
def no_scores(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["a", "b"])


@damaged("token_type is not as long as tokens, 2")
def few_types(writer: gguf.GGUFWriter) -> None:
    no_tokens(writer)
    writer.add_token_list(["a", "b"])
    writer.add_token_types([1])


@damaged("is not a tokenizer")
def merges_of_nothing(writer: gguf.GGUFWriter) -> None:
    byte_level(writer, ["a", "b"], merges=["x y"])


@damaged("is not a tokenizer")
def half_a_merge(writer: gguf.GGUFWriter) -> None:
    byte_level(writer, ["a", "b"], merges=["ab"])


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_a_damaged_tokenizer_is_refused_in_one_line(name: str, file_with: FILES) -> None:
    write, said = DAMAGED[name]
    with pytest.raises(FileError) as refused:
        read_tokenizer(GGUFHeader(file_with(write)))
    assert said in refused.value.message and "\n" not in refused.value.message


def test_what_is_read_is_a_tokenizer_like_any_other(
    learned: tuple[list[str], list[str]], file_with: FILES, tmp_path: Path
) -> None:
    found = read_tokenizer(GGUFHeader(file_with(with_fields(learned))))
    found.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json").as_it_is(found.end_ids)
    assert [again.encode(t) for t in texts(9, 5)] == [found.encode(t) for t in texts(9, 5)]
