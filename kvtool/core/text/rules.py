"""Limits on the rules of a tokenizer.json, which are a program by the author of the file.

A few replacements in a row can make gigabytes from one word, and a template may repeat the text a
thousand times. How much each rule can make from one character is computed before any rule runs. If
all rules together can make too much, the file is refused. This file imports no torch.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import tokenizers

from kvtool.errors import FileError, first_line
from kvtool.reading import parse_json, short

MAX_GROWTH = 256  # characters made from one; the rules of ALBERT and T5 may make 72
MAX_CHARACTERS = 2**22  # characters made from a text; the library takes up to 300 bytes for each
USUAL_GROWTH = 4  # of rules that may run on any text: those for bytes or for blanks
MAX_DECODED = 16  # growth in decoding; 2 is usual
MAX_TEMPLATE_TOKENS = 1024  # tokens that a template puts around a text
LONGEST_TOKEN = 4096  # characters; decoding writes it each time it is generated
LONGEST_AFFIX = 64  # characters of a mark for the beginning, continuation or end of a word
LONGEST_WORD = 1000  # characters in WordPiece, which takes quadratic time; 100 is usual
# The number of special tokens, each of which is searched for in a text, and their characters.
MAX_SPECIAL, MAX_SPECIAL_TEXT = 16_384, 1_048_576
MAX_ADDED = 2**21  # characters of added tokens, normalized; the library takes 80 bytes for each
MAX_TRIE = 2**21  # nodes of the trie of Unigram, which takes 360 bytes for each

Rule = dict[str, Any]
NO_MODEL = {"type": "BPE", "vocab": {}, "merges": []}


@dataclass
class Framing:
    """The special tokens that a tokenizer's own rules put around a text."""

    ids: set[int] = field(default_factory=set)
    n_tokens: int = 0
    n_texts: int = 1  # how often the text itself is repeated


def without_vocabulary(data: Any) -> str:
    """A tokenizer.json with only the rules of the parsed file `data`."""
    return json.dumps({**data, "added_tokens": [], "model": NO_MODEL})


def check_vocabulary(data: Any, inner: tokenizers.Tokenizer, where: str) -> None:
    """Raise FileError, beginning with `where`, if the vocabulary of a tokenizer.json is too large.

    The library has no limits when it reads one. data: the parsed file. inner: its rules alone,
    which change added tokens too.
    """
    try:
        vocab = data["model"]["vocab"]
        pieces = [] if isinstance(vocab, dict) else [name.encode() for name, _ in vocab]  # Unigram
        added = [len(token["content"]) for token in data.get("added_tokens") or ()]
        names = vocab if isinstance(vocab, dict) else (name for name, _ in vocab)
        longest = max(itertools.chain(added, map(len, names)), default=0)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        said = f"its vocabulary is damaged: {type(error).__name__} {short(first_line(error))}"
        raise FileError(f"{where}: is not a tokenizer ({said})") from error
    if longest > LONGEST_TOKEN:
        raise FileError(
            f"{where}: has a token of {longest:,} characters (expected {LONGEST_TOKEN:,} or fewer)"
        )
    if _n_beginnings(pieces) > MAX_TRIE:
        found = f"they have more than {MAX_TRIE:,} beginnings"
        raise FileError(f"{where}: its tokens are too many or too long for Unigram ({found})")
    made = sum(added) * growth(rules(inner.normalizer), where)
    _most(where, "characters of its added tokens", made, MAX_ADDED)


def _n_beginnings(names: Iterable[bytes]) -> int:
    """How many nodes the trie of tokens has; it stops counting above MAX_TRIE."""
    total, before = 0, b""
    for name in sorted(names):
        pairs = enumerate(zip(before, name, strict=False))
        total += len(name) - next((i for i, (a, b) in pairs if a != b), len(before))
        before = name
        if total > MAX_TRIE:
            break
    return total


def check_rules(inner: tokenizers.Tokenizer, where: str) -> int:
    """The largest number of characters that the rules can make from one, as by `growth`.

    Raises FileError, beginning with `where`, if that is too much, or if the rules exceed other
    limits.
    """
    there = growth([*rules(inner.normalizer), *rules(inner.pre_tokenizer)], where)
    _most(where, "characters of one", there, MAX_GROWTH)
    back = growth(rules(inner.decoder), where)
    _most(where, "characters of one that is decoded", back, MAX_DECODED)
    framed = framing(inner)
    if framed.n_texts != 1:
        times = f"{framed.n_texts:,} times (expected once)"
        raise FileError(f"{where}: its template has the text {times}")
    _most(where, "tokens around a text", framed.n_tokens, MAX_TEMPLATE_TOKENS)
    return there


def made_of(text: str, inner: tokenizers.Tokenizer, made_of_one: int) -> int:
    """How many characters the rules make from a text; it stops counting above MAX_CHARACTERS.

    made_of_one: the largest number that they can make from one character. They seldom make so many.
    So they are run, on parts of the text that cannot become too large.
    """
    behind = growth(rules(inner.pre_tokenizer), "")
    made, n = 0, MAX_CHARACTERS // made_of_one
    for start in range(0, len(text), n):
        part = text[start : start + n]
        normalized = part if inner.normalizer is None else inner.normalizer.normalize_str(part)
        made += len(normalized) * behind
        if made > MAX_CHARACTERS:
            break
    return made


def _most(where: str, what: str, found: int, most: int) -> None:
    if found > most:
        many = f"{found:,}" if found < 10**9 else "more than 10^9"
        raise FileError(f"{where}: its rules make {many} {what} (expected {most:,} or fewer)")


def check_model(inner: tokenizers.Tokenizer, vocab: Mapping[str, int], where: str) -> None:
    """Raise FileError, beginning with `where`, for tokens and limits that would cost too much
    later, and for an id with two tokens."""
    model: Any = inner.model
    specials = [t.content for t in inner.get_added_tokens_decoder().values() if t.special]
    if len(specials) > MAX_SPECIAL or sum(map(len, specials)) > MAX_SPECIAL_TEXT:
        found = f"{len(specials):,} special tokens of {sum(map(len, specials)):,} characters"
        expected = f"expected {MAX_SPECIAL:,} of {MAX_SPECIAL_TEXT:,} in all, or fewer"
        raise FileError(f"{where}: has {found} ({expected})")
    if len(set(vocab.values())) < len(vocab):  # the meaning of an id would be random
        seen: dict[int, str] = {}
        twice = next(i for name, i in sorted(vocab.items()) if seen.setdefault(i, name) != name)
        raise FileError(f"{where}: several tokens have the id {twice} (expected one)")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        affix = getattr(model, name, None) or ""
        if len(affix) > LONGEST_AFFIX:
            raise FileError(
                f"{where}: {name} has {len(affix):,} characters (expected {LONGEST_AFFIX} or fewer)"
            )
    most = getattr(model, "max_input_chars_per_word", 0)
    if most > LONGEST_WORD:
        raise FileError(
            f"{where}: max_input_chars_per_word is {most:,} (expected {LONGEST_WORD:,} or less)"
        )


def rules(part: Any) -> Iterator[Rule]:
    """The rules of a part of a tokenizer in order; a sequence gives each of its rules."""
    if part is not None:
        yield from _flat(parse_json(part.__getstate__()))


def _flat(rule: Rule) -> Iterator[Rule]:
    inside = next((part for part in rule.values() if isinstance(part, list)), [])
    if rule["type"] != "Sequence":
        yield rule
        return
    for part in inside:
        yield from _flat(part)


def growth(found: Any, where: str) -> int:
    """The largest number of characters that rules, one after another, can make from one character.

    Growth by the alphabet itself, as in changes of case, is not counted. Raises FileError, which
    begins with `where`, for a damaged rule.
    """
    total = 1
    for rule in found:
        try:
            total *= max(1, GROWTH.get(rule["type"], lambda _: 1)(rule))
        except (ValueError, KeyError, TypeError) as error:
            raise FileError(f"{where}: its {rule['type']} rule is damaged ({error})") from error
    return total


def _replaced(rule: Rule) -> int:
    pattern, content = rule["pattern"], len(rule["content"])
    if not pattern.get("String"):  # an expression may match between any two characters
        return content + 1
    return math.ceil(content / len(pattern["String"]))


def _longest_replacement(rule: Rule) -> int:
    """The longest replacement in a table of SentencePiece: trie size, trie, texts ended by NUL."""
    table = base64.b64decode(rule["precompiled_charsmap"] or "")
    texts = table[4 + int.from_bytes(table[:4], "little") :].decode(errors="replace")
    return max(map(len, texts.split("\0")))


GROWTH: dict[str, Callable[[Rule], int]] = {
    "Replace": _replaced,
    "Prepend": lambda rule: len(rule["prepend"]) + 1,
    "Precompiled": _longest_replacement,
    "ByteLevel": lambda _: 4,  # a character of four bytes, each a character
    "Metaspace": lambda _: 2,
    "BPEDecoder": lambda rule: 1 if rule["suffix"] else 2,
    "CTC": lambda rule: 1 if rule["word_delimiter_token"] else 2,
}


def is_sure(rule: Rule) -> bool:
    """Whether a decoding rule is fast and cannot panic for any text."""
    plain = rule["type"] in ("ByteLevel", "ByteFallback", "Fuse", "Metaspace")
    replaces = rule["type"] == "Replace" and bool(rule["pattern"].get("String"))
    # With `stop`, the library would read beyond the end of a shorter text.
    strips = rule["type"] == "Strip" and not rule["stop"]
    return plain or replaces or strips


def framing(inner: tokenizers.Tokenizer) -> Framing:
    """The special tokens that the rules would put around a text."""
    found = Framing()
    for rule in rules(inner.post_processor):
        if rule["type"] in ("BertProcessing", "RobertaProcessing"):
            found.n_tokens += 2
            found.ids |= {rule["cls"][1], rule["sep"][1]}
        elif rule["type"] == "TemplateProcessing":
            pieces, known = rule["single"], rule["special_tokens"]
            found.n_texts *= sum("Sequence" in piece for piece in pieces)
            names = Counter(p["SpecialToken"]["id"] for p in pieces if "SpecialToken" in p)
            for name, times in names.items():
                ids = known[name]["ids"] if name in known else ()
                found.n_tokens += times * len(ids)
                found.ids.update(ids)
    return found
