"""The tokenizer of a GGUF file as a tokenizer.json, which is checked as any other.

Vocabulary and merges are in the file. The rule that splits a text before is only named there, after
a model that uses it. The rules here are those of llama.cpp (its llama-vocab.cpp).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from kvtool.core.checkpoint.gguf.header import GGUFHeader
from kvtool.core.text.chat import ChatTemplate
from kvtool.core.text.tokenizer import NoTokenizer, Tokenizer
from kvtool.errors import FileError, UsageError
from kvtool.reading import quoted

KEY = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # token_type
BLANK = "\u2581"  # for a blank, in vocabularies of sentencepiece
NAMED = ("bos", "eos", "unknown", "padding", "separator", "cls", "mask")
ENDS = ("eos", "eot", "eom")
# Texts of tokens that always end an answer, as in llama.cpp.
END_TEXTS = frozenset(
    ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>")
)

_CASE = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CASE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|"
_REST = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"
_CAMEL = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+END|"
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*END|"
)
_SLASH = rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS: Mapping[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (rf"{_WORDS}\p{{N}}{{1,3}}{_REST}",),
    "qwen2": (rf"{_WORDS}\p{{N}}{_REST}",),
    "tekken": (_CAMEL.replace("END", "") + rf"\p{{N}}{_SLASH}",),
    "gpt-4o": (_CAMEL.replace("END", f"{_CASE}?") + rf"\p{{N}}{{1,3}}{_SLASH}",),
}
ALIKE = {
    "gpt-2": "phi-2 gigachat a.x-4.0 mellum mpt olmo jais exaone4 trillion granite-docling",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 smaug-bpe dbrx glm4 "
    "chatglm-bpe",
    "qwen2": "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    "gpt-4o": "llama4 kanana2 talkie",
}
SPLITS_BY_NAME = {
    **SPLITS,
    **{name: SPLITS[like] for like, names in ALIKE.items() for name in names.split()},
}
# Where a word that is a token needs no merges, and where a text begins with BOS unless told.
WHOLE_WORDS = (
    "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
    "tekken",
)  # fmt: skip


def read_tokenizer(header: GGUFHeader) -> Tokenizer:
    """The tokenizer of a file. For a kind that kvtool lacks, one that raises an error at the first
    text.

    Raises FileError for a damaged one.
    """
    model, pre = header.get(f"{KEY}model"), header.get(f"{KEY}pre", "default")
    if model == "gpt2" and pre in SPLITS_BY_NAME:
        data = _byte_level(header, pre)
    elif model == "llama":
        data = _sentencepiece(header)
    else:
        what = f"its tokenizer is {quoted(model)}"
        if model == "gpt2":
            what = f"its tokenizer splits texts as {quoted(pre)} does"
        return NoTokenizer(header.path, f"{what}, which kvtool does not have")
    tokenizer = Tokenizer.from_json(json.dumps(data), header.path)
    return tokenizer.as_it_is(_end_ids(header))


def _tokens(header: GGUFHeader) -> tuple[list[str], list[int]]:
    """The texts of all tokens, and their types."""
    tokens = header.get(f"{KEY}tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise FileError(f"{header.where}: {KEY}tokens is missing, or no list of texts")
    types = header.get(f"{KEY}token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise FileError(f"{header.where}: {KEY}token_type is not as long as tokens, {len(tokens)}")
    if len(set(tokens)) < len(tokens):
        twice = next(token for token, n in Counter(tokens).items() if n > 1)
        raise FileError(f"{header.where}: {KEY}tokens has {quoted(twice)} twice")
    return tokens, types


def _byte_level(header: GGUFHeader, pre: str) -> dict[str, Any]:
    """BPE over bytes, as of GPT-2."""
    tokens, _ = _tokens(header)
    merges = header.get(f"{KEY}merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges[:1]):
        raise FileError(f"{header.where}: {KEY}merges is missing, or no list of texts")
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in SPLITS_BY_NAME[pre]
    ]
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return _file(
        header,
        model={
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in merges],
            "ignore_merges": pre in WHOLE_WORDS,
        },
        bos=pre in WHOLE_WORDS,
        pre_tokenizer={
            "type": "Sequence", "pretokenizers": [*splits, {**as_bytes, "use_regex": False}]
        },
        decoder={**as_bytes, "use_regex": True},
    )  # fmt: skip


def _sentencepiece(header: GGUFHeader) -> dict[str, Any]:
    """BPE of sentencepiece: a merge for each pair that makes a token, the best score first."""
    tokens, types = _tokens(header)
    scores = header.get(f"{KEY}scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise FileError(f"{header.where}: {KEY}scores is not as long as tokens, {len(tokens)}")
    unknown = _special(header, "unknown", tokens)
    prefix = header.get(f"{KEY}add_space_prefix", True)
    blank = {"String": " "}
    before: list[Any] = [{"type": "Prepend", "prepend": BLANK}] if prefix else []
    before.append({"type": "Replace", "pattern": blank, "content": BLANK})
    after: list[Any] = [
        {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        after.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _file(
        header,
        model={
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _merges(tokens, types, scores),
            "unk_token": None if unknown is None else tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": BYTE in types,
        },
        bos=True,
        normalizer={"type": "Sequence", "normalizers": before},
        decoder={"type": "Sequence", "decoders": after},
    )


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """Each pair of tokens that makes a third, sorted by the third's score from high to low."""
    usable = {t: i for i, t in enumerate(tokens) if types[i] in (NORMAL, USER, UNUSED)}
    found = []
    for token, i in usable.items():
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in usable and right in usable:
                found.append((-scores[i], usable[left], usable[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _file(header: GGUFHeader, model: dict[str, Any], bos: bool, **rules: Any) -> dict[str, Any]:
    """A tokenizer.json of these parts and the added tokens."""
    tokens, types = _tokens(header)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    ends = _end_ids(header)
    added = [
        {"id": i, "content": token, "special": kind != USER or i in ends, **plain}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if token and (kind in (UNKNOWN, CONTROL, USER) or i in ends)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": _around(header, tokens, bos),
        "decoder": None,
        **rules,
        "model": model,
    }


def _around(header: GGUFHeader, tokens: list[str], bos: bool) -> dict[str, Any] | None:
    """The rule that puts BOS and EOS around a text, if the file asks for them."""
    first = _special(header, "bos", tokens) if header.get(f"{KEY}add_bos_token", bos) else None
    last = _special(header, "eos", tokens) if header.get(f"{KEY}add_eos_token", False) else None
    ids = [i for i in (first, last) if i is not None]
    if not ids:
        return None

    def piece(i: int | None) -> list[Any]:
        return [] if i is None else [{"SpecialToken": {"id": tokens[i], "type_id": 0}}]

    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": [*piece(first), *text, *piece(last)],
        "pair": [*text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in ids
        },
    }


def _special(header: GGUFHeader, name: str, tokens: list[str]) -> int | None:
    """The id of a special token. Raises FileError if the vocabulary lacks it."""
    found = header.get(f"{KEY}{name}_token_id")
    if found is None:
        return None
    if type(found) is not int or not 0 <= found < len(tokens):
        raise FileError(
            f"{header.where}: {KEY}{name}_token_id is {quoted(found)} (of {len(tokens)} tokens)"
        )
    return found


def _end_ids(header: GGUFHeader) -> frozenset[int]:
    """The tokens that end an answer: by the fields, and by their texts."""
    tokens, types = _tokens(header)
    named = (_special(header, name, tokens) for name in ENDS)
    by_text = (
        i for i, token in enumerate(tokens) if token in END_TEXTS and types[i] in (CONTROL, USER)
    )
    return frozenset((*(i for i in named if i is not None), *by_text))


def read_template(header: GGUFHeader) -> ChatTemplate:
    """The chat template of a file. Raises UsageError if there is none."""
    source = header.get("tokenizer.chat_template")
    if not isinstance(source, str) or not source:
        raise UsageError(
            f"--chat: {header.path} has no chat template (tokenizer.chat_template)",
            "Leave --chat out, or take an instruct model, which brings one.",
        )
    tokens, _ = _tokens(header)
    ids = {name: _special(header, name, tokens) for name in NAMED}
    short_names = {"unknown": "unk", "padding": "pad", "separator": "sep"}
    variables = {
        f"{short_names.get(name, name)}_token": tokens[i]
        for name, i in ids.items()
        if i is not None
    }
    return ChatTemplate(source, variables, header.path)
