"""Attacks by a model's folder: its weights, and what it names."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from arena import Arena, Try, attack, edit, tensors_of, with_tensors
from commands import (
    CODE,
    FOREIGN,
    PLACES,
    QUICK,
    SAY,
    SOUND,
    generate,
    theirs,
)

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


@attack(FOREIGN, "one tensor under two names")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    kept = tensors_of(folder / "model.safetensors")
    with_tensors(
        folder / "model.safetensors", {**kept, "norm.weight": 7 * kept["model.norm.weight"]}
    )
    return theirs(folder, says="norm.weight")


@attack(FOREIGN, "a head that is tied in the configuration, and another in the file")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    edit(folder / "config.json", tie_word_embeddings=True)
    return theirs(folder, says="lm_head")


for name, value in (("id2label", 7), ("bos_token_id", "x"), ("return_dict", False)):

    def _field(a: Arena, name: str = name, value: Any = value) -> Try:
        folder = a.model("theirs")
        edit(folder / "config.json", **{name: value})
        argv = ["verify-logits", "--model", folder, "--against", "transformers"]
        return Try(argv, refused=None)

    attack(FOREIGN, f"{name} is {value!r}, asked of verify-logits")(_field)


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


for what, template in (
    ("climbs to Python's classes", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    (
        "never ends",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    ),
    (
        "writes without end",
        "{% set x = 'aaaaaaaaaaaaaaaa' * 99999 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    ),
):

    def _template(a: Arena, template: str = template) -> Try:
        folder = a.model("theirs")
        edit(folder / "tokenizer_config.json", chat_template=template)
        return Try(["generate", "--model", folder, "--chat", *SAY])

    attack(CODE, f"a chat template {what}")(_template)
