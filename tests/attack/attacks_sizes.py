"""Attacks by what takes memory or time: pickles, and sizes that a file claims."""

from __future__ import annotations

import gzip
import os
import signal
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from arena import Arena, Try, attack, edit, header_of, safetensors_of, tensors_of
from commands import (
    PICKLES,
    SAY,
    SIZES,
    generate,
    theirs,
)

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


class _Shadowed:
    """A parameter whose methods its own state replaces."""

    def __reduce__(self) -> Any:
        state = {"detach": OrderedDict(), "clone": OrderedDict()}
        build = torch._utils._rebuild_parameter_with_state  # type: ignore[attr-defined]
        return build, (torch.ones(3), False, OrderedDict(), state)


@attack(PICKLES, "a tensor whose methods are replaced")
def _(a: Arena) -> Try:
    folder = a.model("pickle")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**weights, "model.norm.weight": _Shadowed()}, folder / "pytorch_model.bin")
    return generate(folder)


@attack(PICKLES, "model.pt is a FIFO")
def _(a: Arena) -> Try:
    folder = a.model()
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.pt")
    return generate(folder, says="regular file")


# --- sizes


for what, field in (
    ("10^6 layers", {"num_hidden_layers": 10**6}),
    ("2^62 tokens in the vocabulary", {"vocab_size": 2**62}),
):

    def _larger(a: Arena, field: dict[str, int] = field) -> Try:
        folder = a.model("theirs")
        edit(folder / "config.json", **field)
        return theirs(folder)

    attack(SIZES, f"{what}, read by transformers")(_larger)


@attack(SIZES, "40 million labels, asked of verify-logits --against transformers")
def _(a: Arena) -> Try:
    folder = a.model("theirs")
    edit(folder / "config.json", num_labels=40_000_000)
    return Try(["verify-logits", "--model", folder, "--against", "transformers"], refused=None)


def _lists() -> str:
    return '{"a":[' + ",".join(["[" * 50 + "]" * 50] * 450_000) + "]}"  # 45 MB


for name in ("tokenizer.json", "model.safetensors", "tokenizer_config.json"):
    for number in (None, signal.SIGTERM):

        def _nested(a: Arena, name: str = name, number: Any = number) -> Try:
            folder = a.model("theirs")
            header = name.endswith(".safetensors")
            text = safetensors_of(_lists()) if header else _lists().encode()
            (folder / name).write_bytes(text)
            return Try(["generate", "--model", folder, "--chat", *SAY], signal=number, after=3.0)

        attack(SIZES, f"{name} of 45 MB of lists{', then SIGTERM' if number else ''}")(_nested)


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
