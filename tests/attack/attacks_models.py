"""Attacks by a model's folder: weights, configuration, tokenizer, template."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import signal
import zipfile
from pathlib import Path
from typing import Any

import torch
from arena import (
    Arena,
    Try,
    attack,
    edit,
    header_of,
    safetensors_of,
    tensors_of,
    with_tensors,
)  # fmt: skip

QUICK = ["--max-tokens", "2", "--threads", "1"]
SAY = ["--prompt", "To be, or not", *QUICK]
FOREIGN = "Weights that are not the model's, read by transformers"
PLACES = "Names that lead elsewhere"
CODE = "Code in a folder"
PICKLES = "Pickles that hang or inflate"
SIZES = "Sizes that a file claims"
TOKENIZERS = "Rules hidden in a tokenizer"
LIBRARIES = "Inputs on which a library fails in its own way"
TWICE = "Files that say two things"


def generate(folder: Path, **options: Any) -> Try:
    return Try(["generate", "--model", folder, *SAY], **options)


def theirs(folder: Path, **options: Any) -> Try:
    argv = ["verify-cache", "--impl", "transformers", "--model", folder, "--caches", "dynamic",
            "--scenarios", "token-by-token", "--tokens", "4", "--threads", "1"]  # fmt: skip
    return Try(argv, **options)


SOUND = "Controls: sound files are read"

for name in ("own", "pair", "theirs", "shards", "pickle"):
    attack(SOUND, f"generate, {name}")(
        lambda a, name=name: Try(
            ["generate", "--model", a.model(name), "--prompt", "abacus", *QUICK], refused=False
        )
    )

for name in ("theirs", "shards", "pickle"):
    attack(SOUND, f"verify-cache --impl transformers, {name}")(
        lambda a, name=name: theirs(a.model(name), refused=False)
    )

attack(SOUND, "verify-logits --against transformers")(
    lambda a: Try(["verify-logits", "--model", a.model("theirs"), "--against", "transformers"],
                  refused=False))  # fmt: skip

attack(SOUND, "generate --chat")(
    lambda a: Try(["generate", "--model", a.model("theirs"), "--chat", *SAY], refused=False)
)


# --- weights


@attack(FOREIGN, "a tensor is missing")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    kept = tensors_of(folder / "model.safetensors")
    del kept["model.layers.0.self_attn.q_proj.weight"]
    with_tensors(folder / "model.safetensors", kept)
    return theirs(folder, says="q_proj")


@attack(FOREIGN, "all tensors have other names")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    kept = tensors_of(folder / "model.safetensors")
    with_tensors(folder / "model.safetensors", {f"x.{name}": t for name, t in kept.items()})
    return theirs(folder)


@attack(FOREIGN, "a tensor too many")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    kept = tensors_of(folder / "model.safetensors")
    with_tensors(folder / "model.safetensors", {**kept, "model.extra.weight": torch.ones(3)})
    return theirs(folder, says="extra")


@attack(FOREIGN, "a tensor of another shape")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    kept = tensors_of(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    with_tensors(folder / "model.safetensors", {**kept, name: kept[name][1:].contiguous()})
    return theirs(folder, says="up_proj")


@attack(FOREIGN, "NaN in the weights")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    kept = tensors_of(folder / "model.safetensors")
    kept["model.norm.weight"][0] = float("nan")
    with_tensors(folder / "model.safetensors", kept)
    return theirs(folder, refused=False, says="NaN", held=lambda e: "" if e.code == 1 else "exit 0")


@attack(FOREIGN, "a configuration of another type of model")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    edit(folder / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    return theirs(folder)


@attack(FOREIGN, "the same missing tensor, asked of verify-logits --against transformers")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    kept = tensors_of(folder / "model.safetensors")
    del kept["model.layers.0.self_attn.q_proj.weight"]
    with_tensors(folder / "model.safetensors", kept)
    return Try(["verify-logits", "--model", folder, "--against", "transformers"], says="q_proj")


@attack(FOREIGN, "NaN in the last shard")
def _(a: Arena) -> Try:
    folder = a.model("shards")
    last = sorted(folder.glob("model-*.safetensors"))[-1]
    kept = tensors_of(last)
    next(iter(kept.values())).view(-1)[-1] = float("nan")
    with_tensors(last, kept)
    return generate(folder, says="NaN")


# --- names


def _shard_elsewhere(a: Arena, name: str) -> Path:
    folder = a.model("shards")
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=dict.fromkeys(places, name))
    return folder


for kind, look in (("kvtool", generate), ("transformers", theirs)):
    for name in ("../{}-canary", "/etc/passwd", "a/b.safetensors", "..", "model\x00.safetensors"):

        def _elsewhere(a: Arena, name: str = name, look: Any = look) -> Try:
            return look(_shard_elsewhere(a, name.format(a.here.name)), says="expected a file name")

        attack(PLACES, f"a shard index names {name!r} ({kind})")(_elsewhere)


@attack(PLACES, "the base of an adapter is elsewhere")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    told = {"peft_type": "LORA", "base_model_name_or_path": str(a.here / "elsewhere")}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return theirs(folder, refused=True, says="adapter")


@attack(PLACES, "a name in Hugging Face's cache climbs out of it")
def _(a: Arena) -> Try:
    return Try(["generate", "--model", "a/../../etc", *SAY])


@attack(PLACES, "HF_HUB_CACHE is the home of nobody")
def _(a: Arena) -> Try:
    return Try(["generate", "--model", "org/model", *SAY], env={"HF_HUB_CACHE": "~nosuchuser/x"})


# --- code


class _Runs:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> Any:
        return exec, (self.code,)


@attack(CODE, "model.pt is a pickle that runs")
def _(a: Arena) -> Try:
    folder = a.model()
    (folder / "model.safetensors").unlink()
    torch.save({"w": _Runs(a.code)}, folder / "model.pt")
    return generate(folder, says="code")


@attack(CODE, "pytorch_model.bin is a bare pickle that runs")
def _(a: Arena) -> Try:
    folder = a.model("pickle")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Runs(a.code)))
    return generate(folder)


@attack(CODE, "pytorch_model.bin is a pickle that runs, read by transformers")
def _(a: Arena) -> Try:
    folder = a.model("pickle")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Runs(a.code)))
    return theirs(folder)


@attack(CODE, "auto_map names a module in the folder")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    (folder / "modeling_evil.py").write_text(a.code)
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    return theirs(folder, refused=None)


@attack(CODE, "auto_map and a model_type that nobody knows")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    (folder / "modeling_evil.py").write_text(a.code)
    named = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    edit(folder / "config.json", auto_map=named, model_type="evil")
    return theirs(folder)


@attack(CODE, "attention is an implementation from a repository")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    edit(folder / "config.json", _attn_implementation="kernels-community/flash-attn")
    return theirs(folder)


@attack(CODE, "the weights are quantized in a way that loads a library")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    return theirs(folder)


@attack(CODE, "a chat template climbs to Python's classes")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    climbs = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    edit(folder / "tokenizer_config.json", chat_template=climbs)
    return Try(["generate", "--model", folder, "--chat", *SAY])


@attack(CODE, "a chat template never ends")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    long = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    edit(folder / "tokenizer_config.json", chat_template=long)
    return Try(["generate", "--model", folder, "--chat", *SAY])


@attack(CODE, "a chat template writes without end")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    wide = "{% set x = 'aaaaaaaaaaaaaaaa' * 99999 %}{% for i in range(99999) %}{{ x }}{% endfor %}"
    edit(folder / "tokenizer_config.json", chat_template=wide)
    return Try(["generate", "--model", folder, "--chat", *SAY])


# --- pickles


def bomb(doublings: int) -> bytes:
    """A dictionary whose key is a tuple that holds the last one twice, so many times."""
    # By hand: EMPTY_DICT, then "()" doubled, None, SETITEM. pickle would not write it.
    body = b"\x80\x02}" + b")"
    for _ in range(doublings):
        body += b"q\x00h\x00\x86"
    return body + b"Ns."


def archive(path: Path, data: bytes, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as holder:
        holder.writestr("archive/data.pkl", data)
        holder.writestr("archive/version", b"3\n")
        holder.writestr("archive/byteorder", b"little")


for number in (signal.SIGTERM, signal.SIGINT):

    def _doubled(a: Arena, number: signal.Signals = number) -> Try:
        folder = a.model()
        (folder / "model.safetensors").unlink()
        archive(folder / "model.pt", bomb(60))
        return generate(folder, signal=number)

    attack(PICKLES, f"a key of 60 doubled tuples in model.pt, then {number.name}")(_doubled)


@attack(PICKLES, "a key of 60 doubled tuples in pytorch_model.bin of the old format")
def _(a: Arena) -> Try:
    folder = a.model("pickle")
    (folder / "pytorch_model.bin").write_bytes(bomb(60))
    return generate(folder)


@attack(PICKLES, "a key of 60 doubled tuples, read by transformers")
def _(a: Arena) -> Try:
    folder = a.model("pickle")
    archive(folder / "pytorch_model.bin", bomb(60))
    return theirs(folder)


@attack(PICKLES, "100 million operations that build nothing")
def _(a: Arena) -> Try:
    folder = a.model()
    (folder / "model.safetensors").unlink()
    archive(folder / "model.pt", b"\x80\x02" + b"N0" * 50_000_000 + b"}.", zipfile.ZIP_DEFLATED)
    return generate(folder)


@attack(PICKLES, "a long that has 2^31 digits")
def _(a: Arena) -> Try:
    folder = a.model()
    (folder / "model.safetensors").unlink()
    archive(folder / "model.pt", b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\x01" * 100 + b".")
    return generate(folder)


@attack(PICKLES, "a record that inflates to 8 GiB")
def _(a: Arena) -> Try:
    folder = a.model()
    (folder / "model.safetensors").unlink()
    with (
        zipfile.ZipFile(folder / "model.pt", "w", zipfile.ZIP_DEFLATED) as holder,
        holder.open("archive/data.pkl", "w", force_zip64=True) as record,
    ):
        for _ in range(512):
            record.write(bytes(2**24))
    return generate(folder)


@attack(PICKLES, "model.pt is a FIFO")
def _(a: Arena) -> Try:
    folder = a.model()
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.pt")
    return generate(folder, says="regular file")


# --- sizes


@attack(SIZES, "10^6 layers, read by transformers")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    edit(folder / "config.json", num_hidden_layers=10**6)
    return theirs(folder)


@attack(SIZES, "2^62 tokens in the vocabulary, read by transformers")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    edit(folder / "config.json", vocab_size=2**62)
    return theirs(folder)


@attack(SIZES, "2^62 as width, layers, heads")
def _(a: Arena) -> Try:
    folder = a.model()
    edit(folder / "config.json", d_model=2**62, n_layers=2**62, n_heads=2**62)
    return generate(folder)


@attack(SIZES, "a context of 20 million tokens, whose tables no file holds")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    edit(folder / "config.json", max_position_embeddings=2 * 10**7)
    kept = tensors_of(folder / "model.safetensors")
    assert kept
    return generate(folder, refused=None)


@attack(SIZES, "a header of 60,000 names, one of them twice")
def _(a: Arena) -> Try:
    folder = a.model()
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    names = [f'"n{i}":{entry}' for i in range(60_000)] + [f'"n59999":{entry}']
    (folder / "model.safetensors").write_bytes(safetensors_of("{" + ",".join(names) + "}"))
    return generate(folder, says="twice")


@attack(SIZES, "a header of 2^63 bytes")
def _(a: Arena) -> Try:
    folder = a.model()
    (folder / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    return generate(folder)


@attack(SIZES, "a tensor of 2^62 values")
def _(a: Arena) -> Try:
    folder = a.model()
    header, data = header_of(folder / "model.safetensors")
    header["norm.weight"]["shape"] = [2**31, 2**31]
    (folder / "model.safetensors").write_bytes(safetensors_of(header, data))
    return generate(folder)


for name in ("config.json", "tokenizer.json", "model.safetensors"):

    def _hole(a: Arena, name: str = name) -> Try:
        folder = a.model()
        with open(folder / name, "ab") as file:
            file.truncate(3 * 2**30)
        return generate(folder)

    attack(SIZES, f"{name} with a hole of 3 GiB at its end")(_hole)

    def _fifo(a: Arena, name: str = name) -> Try:
        folder = a.model()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        return generate(folder, says="regular file")

    attack(SIZES, f"{name} is a FIFO")(_fifo)


@attack(SIZES, "generation_config.json is a FIFO")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    (folder / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(folder / "generation_config.json")
    return generate(folder)


@attack(SIZES, "generation_config.json is a FIFO, read by transformers")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    (folder / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(folder / "generation_config.json")
    return theirs(folder, refused=None)


@attack(SIZES, "a gzip file of 2 MB in place of a tokenizer")
def _(a: Arena) -> Try:
    folder = a.model()
    (folder / "tokenizer.json").write_bytes(gzip.compress(bytes(2**21)))
    return generate(folder)


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


@attack(TOKENIZERS, "a vocabulary with the id 2^62")
def _(a: Arena) -> Try:
    folder = a.model()
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    model["vocab"][next(iter(model["vocab"]))] = 2**62
    edit(folder / "tokenizer.json", model=model)
    return generate(folder)


@attack(TOKENIZERS, "a vocabulary with the id 2^32 - 1")
def _(a: Arena) -> Try:
    folder = a.model()
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    model["vocab"][next(iter(model["vocab"]))] = 2**32 - 1
    edit(folder / "tokenizer.json", model=model)
    return generate(folder)


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
                return look(folder)

            attack(LIBRARIES if "twice" not in what else TWICE, f"{name} {what} ({kind})")(_json)


@attack(TWICE, "a shard index places a tensor twice")
def _(a: Arena) -> Try:
    folder = a.model("shards")
    index = folder / "model.safetensors.index.json"
    first = next(iter(json.loads(index.read_text())["weight_map"]))
    text = index.read_text().replace('"weight_map": {', f'"weight_map": {{"{first}": "x",', 1)
    index.write_text(text)
    return generate(folder, says="twice")
