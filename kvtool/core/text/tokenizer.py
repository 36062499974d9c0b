"""Text and token ids: every tokenizer of kvtool behind encode and decode.

The work is done by Hugging Face's `tokenizers`, and a file is its tokenizer.json. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models

from kvtool import ending
from kvtool.core.text.calls import Asking
from kvtool.core.text.rules import (
    MOST_MADE,
    USUAL_GROWTH,
    around,
    check_model,
    check_rules,
    check_vocabulary,
    is_sure,
    made_of,
    rules,
    without_vocabulary,
)
from kvtool.core.text.vocabulary import SPLITTERS, learn_bpe, learn_pieces
from kvtool.errors import FileError, KvtoolError, UsageError
from kvtool.files import write_durable
from kvtool.reading import MOST_JSON, parse_json, read_text
from kvtool.registry import choose

KINDS = ("char", "symbol", "word", "bpe")
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")  # ids 0 to 3 of a tokenizer that has them
PAD, BOS, EOS, UNK = range(4)
PART = 1 << 20  # characters of texts that are encoded together
ENCODED_NBYTES = 256  # what the library takes for a byte of text while it encodes it

_PRE_TOKENIZER_KINDS = {  # what a file's pre-tokenizer says is its kind
    "Split": "char",
    "WhitespaceSplit": "symbol",
    "Whitespace": "word",
    "ByteLevel": "bpe",
}


class Tokenizer:
    """Encodes text as token ids and back.

    kind: char (one token a code point), symbol (split at blanks), word (words and punctuation) or
    bpe (byte-level byte-pair encoding, Sennrich 2016 and Radford 2019, which loses no byte of any
    text). One with `specials` starts with SPECIALS; without them nothing marks an end.
    """

    def __init__(self, inner: tokenizers.Tokenizer, vocab: Mapping[str, int] | None = None) -> None:
        self._inner = inner
        # Text that spells "<pad>" is text: only we put special tokens anywhere.
        inner.encode_special_tokens = True
        pre = [rule["type"] for rule in rules(inner.pre_tokenizer)]
        self.kind = _PRE_TOKENIZER_KINDS.get(pre[0], "other") if len(pre) == 1 else "other"
        # A vocabulary may have gaps, and the embedding needs a row for the largest id.
        ids = (inner.get_vocab() if vocab is None else vocab).values()
        self.vocab_size: int = max(ids, default=-1) + 1
        self.has_specials = all(inner.token_to_id(name) == i for i, name in enumerate(SPECIALS))
        self.end_ids = frozenset({EOS} if self.has_specials else ())  # each ends a text
        self._frames = False  # whether its own rules put special tokens around a text
        self.path: Path | None = None  # of the file that it is from, and so its rules
        self.left_out: tuple[str, ...] = ()  # its rules that are not followed
        self.named_ids: dict[str, int] = {}  # the largest that a rule names, by which rule
        self._made_of_one = 1  # characters that rules of a file can make of one
        self._sure_back = False  # whether decoding takes little time and cannot fail

    @classmethod
    def train(
        cls, kind: str, texts: Iterable[str], vocab_size: int = 1024, specials: bool = True
    ) -> Tokenizer:
        """Learn a vocabulary from texts; `vocab_size` bounds it for bpe alone.

        Raises UsageError for an unknown kind, for bpe too small a vocabulary, and for the others
        texts without a single token.
        """
        choose(kind, KINDS, "--tokenizer")
        # Nothing is kept yet, and the library comes back when it is done.
        with ending.signals_at_default():
            if kind == "bpe":
                inner = learn_bpe(texts, vocab_size, SPECIALS if specials else ())
            else:
                inner = learn_pieces(kind, texts, SPECIALS, unknown=SPECIALS[UNK])
        return cls(inner)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a tokenizer.json, which may be a stranger's, and bound what its rules may do.

        What in it is made for batches in training, such as cutting texts, is `left_out`. Raises
        FileError.
        """
        return cls.from_json(read_text(path, "a tokenizer", most=MOST_JSON), path)

    @classmethod
    def from_json(cls, text: str, path: Path) -> Tokenizer:
        """As `load`, of what a tokenizer.json holds, or would; `path` is the file it is from."""

        def failed(said: str) -> KvtoolError:
            return FileError(f"{path}: is not a tokenizer ({said})")

        try:
            data = parse_json(text)  # it says the same to every parser
        except ValueError as error:
            raise failed(str(error)) from error
        with Asking(failed, careful=True):
            inner = tokenizers.Tokenizer.from_str(without_vocabulary(data))
        made_of_one = check_rules(inner, str(path))
        check_vocabulary(data, inner, str(path))
        del data  # large, and what the library makes of it is too
        with Asking(failed, careful=True):
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
        """Note what the rules of the file `path` are, and leave out those that are for training."""
        inner, self.path = self._inner, path
        padding, model = inner.padding, inner.model
        pad = set() if padding is None else {padding["pad_id"]}
        named = {"its template": around(inner).ids, "its padding": pad}
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
        """Write a tokenizer.json, durably. Raises FileError."""
        write_durable(path, self.to_json())

    def to_json(self) -> bytes:
        """What `save` writes."""
        return bytes(self._inner.to_str(pretty=True).encode())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary and the rules."""
        return hashlib.sha256(self._inner.to_str().encode()).hexdigest()

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, if there is just one."""
        return next(iter(self.end_ids)) if len(self.end_ids) == 1 else None

    def as_it_is(self, end_ids: frozenset[int]) -> Tokenizer:
        """Follow the file's own rules, such as a first token before every text, with none of
        SPECIALS; `end_ids` end a text. Returns itself."""
        self.has_specials, self.end_ids, self._frames = False, end_ids, True
        return self

    def encode(self, text: str, spelled: bool = False) -> list[int]:
        """Token ids of `text`, with special tokens only by rules of the file (`as_it_is`), or, if
        `spelled`, also where the text spells them; what is unknown is UNK.

        Raises UsageError where an unknown piece has no token at all.
        """
        ids = self._ids(text, spelled, self._frames)
        return ids if spelled else self._as_text(ids)

    def encode_pieces(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """Token ids of what a chat template wrote, with special tokens where it spells them, and
        none around it. A piece that is marked True is text, whatever it spells."""
        ids: list[int] = []
        pieces = list(pieces)
        self._check("".join(text for text, _ in pieces))  # and not one by one alone
        for text, only_text in pieces:
            ids += self._continued(text, not only_text) if ids else self._ids(text, not only_text)
        return ids

    def _continued(self, text: str, spelled: bool) -> list[int]:
        """Token ids of `text` after another: some tokenizers begin a text with a blank of their
        own, and after a line break none does (as transformers finds out)."""
        behind, line_break = self._ids(f"\n{text}", spelled), self._ids("\n")
        n = len(line_break)
        return behind[n:] if behind[:n] == line_break else self._ids(text, spelled)

    def _ids(self, text: str, spelled: bool = False, frames: bool = False) -> list[int]:
        self._check(text)
        with self._asking("encode"):
            self._inner.encode_special_tokens = not spelled
            try:
                return self._inner.encode(text, add_special_tokens=frames).ids
            finally:
                self._inner.encode_special_tokens = True

    def _check(self, text: str) -> None:
        """Raise UsageError where the rules of a file would make too much of a text."""
        one = self._made_of_one
        if one <= USUAL_GROWTH or len(text) * one <= MOST_MADE:
            return
        with self._asking("encode"):
            made = made_of(text, self._inner, one)
        if made > MOST_MADE:
            raise UsageError(
                f"{self.path}: its rules make more than {MOST_MADE:,} characters of the text",
                f"It has {len(text):,}: shorten it.",
            )

    def _asking(self, what: str) -> Asking:
        """A call of the library, which may take any time, and panic, on a stranger's rules."""
        where = "" if self.path is None else f"{self.path}: "

        def failed(said: str) -> KvtoolError:
            return UsageError(f"{where}the text cannot be {what}d ({said})")

        sure = self.path is None or (what == "decode" and self._sure_back)
        return Asking(failed, careful=not sure)

    @property
    def special_tokens(self) -> list[str]:
        """How the tokens are spelled that text is never made of."""
        added = self._inner.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    def special_tokens_in(self, text: str) -> list[str]:
        """The special tokens that `text` spells, each once."""
        return [name for name in self.special_tokens if name and name in text]

    def unknown(self, text: str) -> list[str]:
        """The pieces of `text` that encode makes UNK, each once."""
        if not self.has_specials:
            return []
        self._check(text)
        with self._asking("encode"):
            encoding = self._inner.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        return list(dict.fromkeys(text[start:end] for i, (start, end) in spans if i <= UNK))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once."""
        ids: list[list[int]] = []
        part = min(PART, MOST_MADE // self._made_of_one)
        for some in _parts(texts, part):
            for text in some:
                self._check(text)
            with self._asking("encode"):
                found = self._inner.encode_batch(some, add_special_tokens=self._frames)
            ids += [self._as_text(encoding.ids) for encoding in found]
        return ids

    def _as_text(self, ids: list[int]) -> list[int]:
        """`ids` of a text: a vocabulary of whole pieces finds a piece "<eos>" among SPECIALS."""
        return [UNK if i < UNK else i for i in ids] if self.has_specials else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are left out, and broken UTF-8 becomes U+FFFD."""
        plain = self._plain(ids)
        with self._asking("decode"):
            return self._inner.decode(plain, skip_special_tokens=False)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each token's own text, for comparing token by token."""
        return [self._inner.id_to_token(i) or "" for i in self._plain(ids)]

    def units(self, text: str) -> list[str]:
        """What a score counts: characters, symbols, words and punctuation, or, for subwords and
        bytes, what blanks separate."""
        if self.kind in ("bpe", "other"):
            return text.split()
        return [piece for piece, _ in SPLITTERS[self.kind]().pre_tokenize_str(text)]

    def stream(self) -> TextStream:
        """A decoder of ids that arrive one by one."""
        return TextStream(self)

    def _plain(self, ids: Iterable[int]) -> list[int]:
        floor = len(SPECIALS) if self.has_specials else 0
        return [i for i in ids if i >= floor]


class NoTokenizer(Tokenizer):
    """In place of the file `path`, which is not there, or of what is wrong with it: a model can be
    run, but not on text."""

    def __init__(self, path: Path, why: str = "") -> None:
        super().__init__(tokenizers.Tokenizer(models.BPE()))
        self.path, self.why = path, why

    def encode(self, text: str, spelled: bool = False) -> list[int]:
        """Raises FileError."""
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
        """The ids themselves."""
        return " ".join(map(str, ids))


class TextStream:
    """Text of tokens as they come; an incomplete character waits for those that complete it."""

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
        with self._tokenizer._asking("decode"):
            text = self._inner.step(self._tokenizer._inner, token) or ""
        self._shown += len(text)
        return text

    def finish(self) -> str:
        """What was still waiting."""
        return self._tokenizer.decode(self._ids)[self._shown :]


def _parts(texts: Sequence[str], n: int) -> Iterator[list[str]]:
    """`texts` in runs of about `n` characters: between calls of the library signals are heard, and
    memory is given back."""
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
    """Raise CapacityError, which begins with `where`, for a text too long to be encoded at once."""
    import torch

    from kvtool.core.machine import require_memory

    needed = ENCODED_NBYTES * len(text.encode())
    what = f"{where}: the tokens of {len(text):,} characters"
    require_memory(what, needed, torch.device("cpu"))


def guess_kind(texts: Sequence[str]) -> str:
    """The kind that suits one side of a list of pairs.

    char for single words, but for a few, symbol for a small inventory of blank-separated pieces
    (phones), bpe for everything else.
    """
    pieces = [text.split() for text in texts]
    n_pieces = sum(map(len, pieces))
    inventory = {piece for row in pieces for piece in row}
    if n_pieces <= 1.2 * len(texts):
        return "char"
    return "symbol" if len(inventory) <= 256 else "bpe"
