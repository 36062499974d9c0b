"""Tokenizers: encoding text as token ids, and decoding ids.

Hugging Face's `tokenizers` does the work, and files are its tokenizer.json. This file imports no
torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models

from kvtool import ending
from kvtool.core.text.calls import LibraryCall
from kvtool.core.text.rules import (
    MAX_CHARACTERS,
    USUAL_GROWTH,
    check_model,
    check_rules,
    check_vocabulary,
    framing,
    is_sure,
    made_of,
    rules,
    without_vocabulary,
)
from kvtool.core.text.vocabulary import SPLITTERS, learn_bpe, learn_pieces
from kvtool.errors import FileError, KvtoolError, UsageError
from kvtool.files import write_durable
from kvtool.reading import MAX_JSON_BYTES, parse_json, read_text
from kvtool.registry import choose

KINDS = ("char", "symbol", "word", "bpe")
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")  # ids 0 to 3 of a tokenizer that has them
PAD, BOS, EOS, UNK = range(4)
PART = 1 << 20  # characters of texts that are encoded together
ENCODED_NBYTES = 256  # memory that the library takes to encode a byte of text

_PRE_TOKENIZER_KINDS = {  # pre-tokenizer of a file -> kind
    "Split": "char",
    "WhitespaceSplit": "symbol",
    "Whitespace": "word",
    "ByteLevel": "bpe",
}


class Tokenizer:
    """Encodes text as token ids and back.

    kind: char (one token per code point), symbol (split at blanks), word (words and punctuation) or
    bpe (byte-level byte-pair encoding, Sennrich 2016, Radford 2019; it preserves every byte). With
    specials, the vocabulary starts with SPECIALS; without, there is no end token.
    """

    def __init__(self, inner: tokenizers.Tokenizer, vocab: Mapping[str, int] | None = None) -> None:
        self._inner = inner
        # "<pad>" in a text is plain text: only kvtool adds special tokens.
        inner.encode_special_tokens = True
        pre = [rule["type"] for rule in rules(inner.pre_tokenizer)]
        self.kind = _PRE_TOKENIZER_KINDS.get(pre[0], "other") if len(pre) == 1 else "other"
        # A vocabulary may have gaps; the embedding needs rows up to the largest id.
        ids = (inner.get_vocab() if vocab is None else vocab).values()
        self.vocab_size: int = max(ids, default=-1) + 1
        self.has_specials = all(inner.token_to_id(name) == i for i, name in enumerate(SPECIALS))
        self.end_ids = frozenset({EOS} if self.has_specials else ())  # each ends a text
        self._frames = False  # whether rules of its file put special tokens around a text
        self.path: Path | None = None  # the file with its rules
        self.left_out: tuple[str, ...] = ()  # rules of the file that are not followed
        self.named_ids: dict[str, int] = {}  # rule -> the largest id that it names
        self._made_of_one = 1  # characters that rules of the file can make from one
        self._sure_back = False  # whether decoding is fast and cannot fail

    @classmethod
    def train(
        cls, kind: str, texts: Iterable[str], vocab_size: int = 1024, specials: bool = True
    ) -> Tokenizer:
        """Learn a vocabulary from texts; `vocab_size` limits only that of bpe.

        Raises UsageError for an unknown kind, a bpe vocabulary that is too small, and texts without
        a token for the other kinds.
        """
        choose(kind, KINDS, "--tokenizer")
        # A signal may end the process here, since there is nothing to save yet. The library would
        # not return before it is done.
        with ending.signals_at_default():
            if kind == "bpe":
                inner = learn_bpe(texts, vocab_size, SPECIALS if specials else ())
            else:
                inner = learn_pieces(kind, texts, SPECIALS, unknown=SPECIALS[UNK])
        return cls(inner)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a tokenizer.json, which may be untrusted, and limit its rules.

        Rules for batches in training, such as truncation, are `left_out`. Raises FileError for a
        file that is missing, damaged or beyond the limits.
        """
        return cls.from_json(read_text(path, "a tokenizer", most=MAX_JSON_BYTES), path)

    @classmethod
    def from_json(cls, text: str, path: Path) -> Tokenizer:
        """As `load`, from the text of a tokenizer.json; `path` names its file in errors."""

        def failed(said: str) -> KvtoolError:
            return FileError(f"{path}: is not a tokenizer ({said})")

        try:
            data = parse_json(text)  # strict: every parser reads the same from it
        except ValueError as error:
            raise failed(str(error)) from error
        with LibraryCall(failed, careful=True):
            inner = tokenizers.Tokenizer.from_str(without_vocabulary(data))
        made_of_one = check_rules(inner, str(path))
        check_vocabulary(data, inner, str(path))
        del data  # it is large, and so is what the library makes from it
        with LibraryCall(failed, careful=True):
            inner = tokenizers.Tokenizer.from_str(text)
            vocab = inner.get_vocab()
        if not vocab:
            raise FileError(f"{path}: is a tokenizer without a vocabulary")
        check_model(inner, vocab, str(path))
        tokenizer = cls(inner, vocab)
        tokenizer._made_of_one = made_of_one
        tokenizer._take_rules(path)
        return tokenizer

    def _take_rules(self, path: Path) -> None:
        """Record the rules of the file `path`, and leave out those for training."""
        inner, self.path = self._inner, path
        padding, model = inner.padding, inner.model
        pad = set() if padding is None else {padding["pad_id"]}
        named = {"its template": framing(inner).ids, "its padding": pad}
        self.named_ids = {name: max(ids) for name, ids in named.items() if ids}
        self._sure_back = all(is_sure(rule) for rule in rules(inner.decoder))
        found = {"truncation": inner.truncation, "padding": padding}
        inner.no_truncation()
        inner.no_padding()
        for name in ("dropout", "alpha", "nbest_size"):  # of bpe and of unigram
            if found.setdefault(name, getattr(model, name, None)) is not None:
                setattr(model, name, None)
        self.left_out = tuple(name for name, value in found.items() if value is not None)

    def save(self, path: Path) -> None:
        """Write a tokenizer.json durably. Raises FileError."""
        write_durable(path, self.to_json())

    def to_json(self) -> bytes:
        """The bytes of the tokenizer.json that `save` writes."""
        return bytes(self._inner.to_str(pretty=True).encode())

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the vocabulary and the rules, in hexadecimal."""
        return hashlib.sha256(self._inner.to_str().encode()).hexdigest()

    @property
    def eos_id(self) -> int | None:
        """The id of the end token; None unless there is just one."""
        return next(iter(self.end_ids)) if len(self.end_ids) == 1 else None

    def as_it_is(self, end_ids: frozenset[int]) -> Tokenizer:
        """Use the file's own rules, such as a first token before each text, and not SPECIALS.

        end_ids: the tokens that end a text. Returns the tokenizer itself.
        """
        self.has_specials, self.end_ids, self._frames = False, end_ids, True
        return self

    def encode(self, text: str, spelled: bool = False) -> list[int]:
        """The ids of `text`; unknown pieces become UNK.

        Special tokens come only from rules of the file (`as_it_is`), and, if `spelled`, from their
        names in the text. Raises UsageError for an unknown piece if there is no UNK.
        """
        ids = self._ids(text, spelled, self._frames)
        return ids if spelled else self._as_text(ids)

    def encode_pieces(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """The ids of a rendered chat template, without special tokens around it.

        pieces: texts, each with True for plain text. In other pieces the names of special tokens
        become these tokens.
        """
        ids: list[int] = []
        pieces = list(pieces)
        self._check("".join(text for text, _ in pieces))  # together, not only one by one
        for text, only_text in pieces:
            ids += self._continued(text, not only_text) if ids else self._ids(text, not only_text)
        return ids

    def _continued(self, text: str, spelled: bool) -> list[int]:
        """The ids of `text` after another text.

        Some tokenizers add a blank before a text, but not after a line break; transformers uses
        the same fact.
        """
        behind, line_break = self._ids(f"\n{text}", spelled), self._ids("\n")
        n = len(line_break)
        return behind[n:] if behind[:n] == line_break else self._ids(text, spelled)

    def _ids(self, text: str, spelled: bool = False, frames: bool = False) -> list[int]:
        self._check(text)
        with self._library_call("encode"):
            self._inner.encode_special_tokens = not spelled
            try:
                return self._inner.encode(text, add_special_tokens=frames).ids
            finally:
                self._inner.encode_special_tokens = True

    def _check(self, text: str) -> None:
        """Raise UsageError if the rules of the file would make too many characters from a text."""
        one = self._made_of_one
        if one <= USUAL_GROWTH or len(text) * one <= MAX_CHARACTERS:
            return
        with self._library_call("encode"):
            made = made_of(text, self._inner, one)
        if made > MAX_CHARACTERS:
            raise UsageError(
                f"{self.path}: its rules make more than {MAX_CHARACTERS:,} characters of the text",
                f"It has {len(text):,}: shorten it.",
            )

    def _library_call(self, what: str) -> LibraryCall:
        """A context for a call of the library, which may take long or panic on untrusted rules."""
        where = "" if self.path is None else f"{self.path}: "

        def failed(said: str) -> KvtoolError:
            return UsageError(f"{where}the text cannot be {what}d ({said})")

        sure = self.path is None or (what == "decode" and self._sure_back)
        return LibraryCall(failed, careful=not sure)

    @property
    def special_tokens(self) -> list[str]:
        """The names of the special tokens, which plain text never becomes."""
        added = self._inner.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    def special_tokens_in(self, text: str) -> list[str]:
        """The special tokens whose names `text` contains, each once."""
        return [name for name in self.special_tokens if name and name in text]

    def unknown(self, text: str) -> list[str]:
        """The pieces of `text` that encode turns into UNK, each once."""
        if not self.has_specials:
            return []
        self._check(text)
        with self._library_call("encode"):
            encoding = self._inner.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        return list(dict.fromkeys(text[start:end] for i, (start, end) in spans if i <= UNK))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, encoded together; as `encode`."""
        ids: list[list[int]] = []
        part = min(PART, MAX_CHARACTERS // self._made_of_one)
        for some in _parts(texts, part):
            for text in some:
                self._check(text)
            with self._library_call("encode"):
                found = self._inner.encode_batch(some, add_special_tokens=self._frames)
            ids += [self._as_text(encoding.ids) for encoding in found]
        return ids

    def _as_text(self, ids: list[int]) -> list[int]:
        """`ids` of a text with special tokens made UNK: a vocabulary of whole pieces would turn the
        piece "<eos>" into EOS."""
        return [UNK if i < UNK else i for i in ids] if self.has_specials else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are left out, and broken UTF-8 becomes U+FFFD."""
        plain = self._plain(ids)
        with self._library_call("decode"):
            return self._inner.decode(plain, skip_special_tokens=False)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The text of each token, to compare token by token."""
        return [self._inner.id_to_token(i) or "" for i in self._plain(ids)]

    def units(self, text: str) -> list[str]:
        """The units that a score counts: characters, symbols, or words and punctuation; for bpe the
        parts between blanks."""
        if self.kind in ("bpe", "other"):
            return text.split()
        return [piece for piece, _ in SPLITTERS[self.kind]().pre_tokenize_str(text)]

    def stream(self) -> TextStream:
        """A decoder for ids that come one by one."""
        return TextStream(self)

    def _plain(self, ids: Iterable[int]) -> list[int]:
        floor = len(SPECIALS) if self.has_specials else 0
        return [i for i in ids if i >= floor]


class NoTokenizer(Tokenizer):
    """Stands for a tokenizer that is missing or damaged: the model can run on ids, but not on text.

    path: its file. why: what is wrong with it; empty if it is missing.
    """

    def __init__(self, path: Path, why: str = "") -> None:
        super().__init__(tokenizers.Tokenizer(models.BPE()))
        self.path, self.why = path, why

    def encode(self, text: str, spelled: bool = False) -> list[int]:
        """Raises FileError: there is no tokenizer."""
        if self.why:
            raise FileError(
                f"{self.path}: {self.why}, and text needs one",
                "bench and verify-cache do without, on token ids.",
            )
        raise FileError(
            f"{self.path}: not found, and text needs a tokenizer",
            "Put the model's tokenizer.json there; bench and verify-cache do without.",
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The ids themselves, as text."""
        return " ".join(map(str, ids))


class TextStream:
    """Decodes tokens one by one; an incomplete character waits for the tokens that complete it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._inner = decoders.DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._shown = 0

    def step(self, token: int) -> str:
        """The text that `token` adds, perhaps none yet."""
        if not self._tokenizer._plain([token]):
            return ""
        self._ids.append(token)
        with self._tokenizer._library_call("decode"):
            text = self._inner.step(self._tokenizer._inner, token) or ""
        self._shown += len(text)
        return text

    def finish(self) -> str:
        """The text that was still waiting."""
        return self._tokenizer.decode(self._ids)[self._shown :]


def _parts(texts: Sequence[str], n: int) -> Iterator[list[str]]:
    """Yield `texts` in parts of about `n` characters.

    Between the parts, signals take effect and the library frees memory.
    """
    part: list[str] = []
    size = 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= n:
            yield part
            part, size = [], 0
    if part:
        yield part


def require_room(where: str, text: str) -> None:
    """Raise CapacityError, beginning with `where`, for a text too long to encode at once."""
    import torch

    from kvtool.core.machine import require_memory

    needed = ENCODED_NBYTES * len(text.encode())
    what = f"{where}: the tokens of {len(text):,} characters"
    require_memory(what, needed, torch.device("cpu"))


def guess_kind(texts: Sequence[str]) -> str:
    """The kind that suits the sources, or the targets, of pairs.

    char if nearly all texts are single words; symbol for a small set of pieces between blanks, such
    as phones; else bpe.
    """
    pieces = [text.split() for text in texts]
    n_pieces = sum(map(len, pieces))
    inventory = {piece for row in pieces for piece in row}
    if n_pieces <= 1.2 * len(texts):
        return "char"
    return "symbol" if len(inventory) <= 256 else "bpe"
