"""Parts of a tokenizer.json, to be put in place of those of a right one."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

from kvtool.core.text.tokenizer import Tokenizer

TEXT = "a bee and a wasp"
Spec = dict[str, Any]
SPEC: Spec = json.loads(Tokenizer.train("bpe", [TEXT * 9], 300)._inner.to_str())
A_TEXT = {"Sequence": {"id": "A", "type_id": 0}}


METASPACE = {
    "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True
}  # fmt: skip


def replace(pattern: str, content: str, kind: str = "String") -> Spec:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def normalized(*parts: Spec) -> Spec:
    return {"normalizer": {"type": "Sequence", "normalizers": list(parts)}}


def split_by(*parts: Spec) -> Spec:
    every = [*parts, SPEC["pre_tokenizer"]]
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": every}}


def decoded(*parts: Spec) -> Spec:
    return {"decoder": {"type": "Sequence", "decoders": [SPEC["decoder"], *parts]}}


def charsmap(trie: bytes, texts: bytes, size: int | None = None) -> Spec:
    table = struct.pack("<I", len(trie) if size is None else size) + trie + texts
    return normalized(
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    )


def template(*pieces: Spec, ids: tuple[int, ...] = (1,)) -> Spec:
    special = {"id": "X", "ids": list(ids), "tokens": ["X"] * len(ids)}
    pair = [*pieces, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": list(pieces),
            "pair": pair,
            "special_tokens": {"X": special},
        }
    }


def special(name: str = "X") -> Spec:
    return {"SpecialToken": {"id": name, "type_id": 0}}


def model(**fields: Any) -> Spec:
    return {"model": {**SPEC["model"], **fields}}


def vocabulary(**tokens: int) -> Spec:
    return model(vocab={**SPEC["model"]["vocab"], **tokens})


def added(content: str, number: int = 900) -> Spec:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "added_tokens": [
            *SPEC["added_tokens"],
            {"id": number, "content": content, "special": True, **flags},
        ]
    }


def specials(n: int, name: str) -> Spec:
    kept = [added(name.format(i), 900 + i)["added_tokens"][-1] for i in range(n)]
    return {"added_tokens": kept}


def padding(length: int, pad_id: int = 0) -> Spec:
    return {
        "padding": {
            "strategy": {"Fixed": length},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": pad_id,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        }
    }


def truncation(length: int, stride: int = 0) -> Spec:
    return {
        "truncation": {
            "direction": "Right",
            "max_length": length,
            "strategy": "LongestFirst",
            "stride": stride,
        }
    }


def written(folder: Path, change: Spec) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**SPEC, **change}))
    return path
