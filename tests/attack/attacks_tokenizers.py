"""Attacks by a tokenizer, and by JSON on which a library fails."""

from __future__ import annotations

import json
import signal
from typing import Any

from arena import Arena, Try, attack, edit
from commands import (
    LIBRARIES,
    QUICK,
    SAY,
    TOKENIZERS,
    TWICE,
    generate,
    theirs,
)

# --- tokenizers


@attack(TOKENIZERS, "truncation to three tokens")
def _(a: Arena) -> Try:
    folder = a.model()
    rule = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    edit(folder / "tokenizer.json", truncation=rule)
    return Try(["generate", "--model", folder, "--prompt", "To be, or not", "--max-tokens", "1"],
               refused=False, says="truncation")  # fmt: skip


@attack(TOKENIZERS, "padding to 60 million tokens")
def _(a: Arena) -> Try:
    folder = a.model()
    edit(folder / "tokenizer.json", padding=_padding(60_000_000, 0))
    return generate(folder, refused=False, says="padding")


@attack(TOKENIZERS, "a pad token beyond the vocabulary")
def _(a: Arena) -> Try:
    folder = a.model()
    edit(folder / "tokenizer.json", padding=_padding(8, 10**6))
    return generate(folder)


def _padding(length: int, token: int) -> dict[str, Any]:
    return {"strategy": {"Fixed": length}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": token, "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip


@attack(TOKENIZERS, "a template with a token beyond the vocabulary")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    rule = {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text, text]}
    rule["special_tokens"] = {"<s>": {"id": "<s>", "ids": [99_999], "tokens": ["<s>"]}}
    edit(folder / "tokenizer.json", post_processor=rule)
    return generate(folder)


for what, token in (("2^62", 2**62), ("2^32 - 1", 2**32 - 1)):

    def _far_id(a: Arena, token: int = token) -> Try:
        folder = a.model()
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        model["vocab"][next(iter(model["vocab"]))] = token
        edit(folder / "tokenizer.json", model=model)
        return generate(folder)

    attack(TOKENIZERS, f"a vocabulary with the id {what}")(_far_id)


@attack(TOKENIZERS, "2,500 tokens of 4,000 characters, of which the library makes a tree")
def _(a: Arena) -> Try:
    folder = a.model()
    words = [[f"{i:04}{'ab' * 1998}", -1.0] for i in range(2500)]
    edit(folder / "tokenizer.json", model={"type": "Unigram", "unk_id": 0, "vocab": words})
    return generate(folder)


@attack(TOKENIZERS, "a template and rules that multiply each other")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    edit(folder / "tokenizer_config.json", chat_template="{{ 'a' * 1000000 }}")
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 60}
    edit(folder / "tokenizer.json", normalizer=rule)
    return Try(["generate", "--model", folder, "--chat", *SAY])


@attack(TOKENIZERS, "more tokens than the model has")
def _(a: Arena) -> Try:
    folder = a.model()
    edit(folder / "config.json", vocab_size=100)
    return generate(folder)


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


for number in (signal.SIGTERM, signal.SIGINT):

    def _backtracks(a: Arena, number: signal.Signals = number) -> Try:
        folder = a.model()
        edit(folder / "tokenizer.json", normalizer=_replace("(a|aa)+$", "b"))
        prompt = "a" * 60 + "!"
        return Try(["generate", "--model", folder, "--prompt", prompt, *QUICK], signal=number)

    attack(TOKENIZERS, f"a pattern that backtracks for ever, then {number.name}")(_backtracks)


@attack(TOKENIZERS, "rules that make a text a thousandfold longer, four times")
def _(a: Arena) -> Try:
    folder = a.model()
    grows = {"type": "Sequence", "normalizers": [_replace("a", "a" * 1000)] * 4}
    edit(folder / "tokenizer.json", normalizer=grows)
    return Try(["generate", "--model", folder, "--prompt", "aa", *QUICK])


# --- what libraries raise


@attack(LIBRARIES, "an unknown token that is not in the vocabulary, where Rust panics or fails")
def _(a: Arena) -> Try:
    folder = a.model()
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<none>"}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return generate(folder)


@attack(LIBRARIES, "a merge of tokens shorter than the library takes for granted")
def _(a: Arena) -> Try:
    folder = a.model()
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    model |= {"continuing_subword_prefix": "abcdefgh", "vocab": {"a": 0, "b": 1, "ab": 2},
              "merges": [["a", "b"]]}  # fmt: skip
    edit(folder / "tokenizer.json", model=model)
    return generate(folder)


for name in ("config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json"):
    for kind, look in (("kvtool", generate), ("transformers", theirs)):
        if kind == "transformers" and name.startswith("tokenizer"):
            continue  # it is not given to transformers
        for what, text in (
            ("nested 100,000 deep", '{"a":' * 100_000 + "1" + "}" * 100_000),
            ("with a number of 5,000 digits", '{"a":' + "9" * 5000 + "}"),
            ("with a name twice", '{"model_type":"llama","model_type":"gpt2"}'),
        ):

            def _json(a: Arena, name: str = name, look: Any = look, text: str = text) -> Try:
                folder = a.model("theirs")
                (folder / name).write_text(text)
                chats = name == "tokenizer_config.json"
                if chats:
                    return Try(["generate", "--model", folder, "--chat", *SAY])
                # transformers opens nothing itself: what kvtool does not read, nobody does.
                unread = look is theirs and name == "generation_config.json"
                return look(folder, refused=None if unread else True)

            attack(LIBRARIES if "twice" not in what else TWICE, f"{name} {what} ({kind})")(_json)


@attack(TWICE, "a shard index places a tensor twice")
def _(a: Arena) -> Try:
    folder = a.model("shards")
    index = folder / "model.safetensors.index.json"
    first = next(iter(json.loads(index.read_text())["weight_map"]))
    text = index.read_text().replace('"weight_map": {', f'"weight_map": {{"{first}": "x",', 1)
    index.write_text(text)
    return generate(folder, says="twice")
