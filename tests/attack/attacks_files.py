"""Attacks by single files: saved caches, references, baselines, data."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from arena import Arena, Try, attack, edit, header_of, safetensors_of
from commands import (
    BENCH,
    CODE,
    QUICK,
    SAY,
    SIZES,
    SOUND,
    TWICE,
)
from subjects import PAIRS

CACHES = "Caches of another model"
NUMBERS = "Numbers that are none"


# --- saved caches


def _cached(a: Arena, folder: Path, **options: Any) -> Try:
    return Try(["generate", "--model", folder, *SAY, "--load-cache", a.here / "c.safetensors"],
               **options)  # fmt: skip


@attack(SOUND, "generate --load-cache")
def _(a: Arena) -> Try:
    a.file("c.safetensors")
    return _cached(a, a.model(), refused=False)


for field, value in (("norm_eps", 0.5), ("rope_theta", 77.0), ("activation", "relu")):

    def _changed(a: Arena, field: str = field, value: Any = value) -> Try:
        a.file("c.safetensors")
        folder = a.model()
        edit(folder / "config.json", **{field: value})
        return _cached(a, folder, says=field)

    attack(CACHES, f"{field} was changed since it was saved")(_changed)


@attack(CACHES, "the tokenizer was changed since it was saved")
def _(a: Arena) -> Try:
    a.file("c.safetensors")
    folder = a.model()
    edit(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    return _cached(a, folder, says="tokenizer")


for what, change in (
    ("beyond the vocabulary", lambda ids: json.dumps([10**6, *json.loads(ids)[1:]])),
    ("nested 100,000 deep", lambda ids: "[" * 100_000),
):

    def _other_ids(a: Arena, change: Callable[[str], str] = change) -> Try:
        path = a.file("c.safetensors")
        header, data = header_of(path)
        header["__metadata__"]["ids"] = change(header["__metadata__"]["ids"])
        path.write_bytes(safetensors_of(header, data))
        return _cached(a, a.model())

    attack(CACHES, f"token ids {what}")(_other_ids)


@attack(NUMBERS, "a saved cache with NaN")
def _(a: Arena) -> Try:
    path = a.file("c.safetensors")
    header, data = header_of(path)
    path.write_bytes(safetensors_of(header, b"\xff" * 64 + data[64:]))
    return _cached(a, a.model(), says="NaN")


# --- references


def _referred(a: Arena, path: Path, **options: Any) -> Try:
    return Try(["verify-logits", "--model", a.model(), "--reference", path, "--threads", "1"],
               **options)  # fmt: skip


for name in ("r.npz", "r.safetensors"):
    attack(SOUND, f"verify-logits --reference {name}")(
        lambda a, name=name: _referred(a, a.file(name), refused=False)
    )


@attack(TWICE, "an npz reference has two pairs of ids and logits for one prompt")
def _(a: Arena) -> Try:
    path = a.file("r.npz")
    held = dict(np.load(path))
    np.savez(path, **held, **{"ids.0": held["ids"], "logits.0": held["logits"] + 1})
    return _referred(a, path)


@attack(TWICE, "an npz reference has a member twice")
def _(a: Arena) -> Try:
    path = a.file("r.npz")
    with zipfile.ZipFile(path) as archive:
        held = archive.read("ids.npy")
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")  # of the very thing that is meant
        archive.writestr("ids.npy", held)
    return _referred(a, path)


@attack(SIZES, "an npz reference with a member of 4 GiB that nobody named")
def _(a: Arena) -> Try:
    path = a.file("r.npz")
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("other.npy", "w", force_zip64=True) as member,
    ):
        member.write(_npy_header((2**32,)))
        for _ in range(256):
            member.write(bytes(2**24))
    return _referred(a, path)


@attack(SIZES, "an npz reference whose header claims 2^40 values")
def _(a: Arena) -> Try:
    path = a.here / "r.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ids.npy", _npy_header((2**40,)))
        archive.writestr("logits.npy", _npy_header((2**40, 4)))
    return _referred(a, path)


def _npy_header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


@attack(CODE, "an npz reference holds a pickle")
def _(a: Arena) -> Try:
    path = a.here / "r.npz"
    np.savez(path, ids=np.array([{"a": 1}], dtype=object), logits=np.zeros((1, 2)))
    return _referred(a, path)


for suffix in ("npz", "safetensors"):

    def _sparse(a: Arena, suffix: str = suffix) -> Try:
        path = a.file(f"r.{suffix}")
        with open(path, "ab") as file:
            file.truncate(3 * 2**30)
        return _referred(a, path)

    attack(SIZES, f"a reference ({suffix}) with a hole of 3 GiB at its end")(_sparse)


@attack(NUMBERS, "a reference with infinite logits")
def _(a: Arena) -> Try:
    path = a.file("r.npz")
    held = dict(np.load(path))
    held["logits"][0, 0] = np.inf
    np.savez(path, **held)
    return _referred(a, path, says="infini")


@attack(NUMBERS, "a reference with token ids below 0")
def _(a: Arena) -> Try:
    path = a.file("r.npz")
    held = dict(np.load(path))
    np.savez(path, ids=-held["ids"], logits=held["logits"])
    return _referred(a, path)


# --- baselines


def _compared(a: Arena, path: Path, **options: Any) -> Try:
    argv = ["bench", "--model", a.model(), *BENCH,
            "--compare", path, "--fail-if", "median:1000%", "--force"]  # fmt: skip
    return Try(argv, **options)


attack(SOUND, "bench --compare --fail-if")(lambda a: _compared(a, a.file("b.json"), refused=False))

for bad in (float("nan"), float("inf"), -1.0, "fast", None, []):

    def _sample(a: Arena, bad: Any = bad) -> Try:
        path = a.file("b.json")
        data = json.loads(path.read_text())
        data["measurements"][0]["samples_s"][0] = bad
        path.write_text(json.dumps(data))
        return _compared(a, path)

    attack(NUMBERS, f"a baseline with a sample of {bad!r}")(_sample)


@attack(TWICE, "a baseline with a row twice")
def _(a: Arena) -> Try:
    path = a.file("b.json")
    data = json.loads(path.read_text())
    slow = {**data["measurements"][0], "samples_s": [1e6]}
    path.write_text(json.dumps({**data, "measurements": [*data["measurements"], slow]}))
    return _compared(a, path)


@attack(TWICE, "a baseline with its measurements twice")
def _(a: Arena) -> Try:
    path = a.file("b.json")
    path.write_text(path.read_text().replace("{", '{"measurements": [],', 1))
    return _compared(a, path, says="twice")


@attack(NUMBERS, "a baseline of other types all over")
def _(a: Arena) -> Try:
    path = a.file("b.json")
    edit(path, measurements={"a": 1}, environment=[], settings=7, resolved="x")
    return _compared(a, path)


# --- data


def _trained(a: Arena, path: Path, **options: Any) -> Try:
    return Try(["train-seq2seq", "--data", path, "--out", a.here / "out", "--steps", "1",
                "--d-model", "8", "--threads", "1"], **options)  # fmt: skip


@attack(SOUND, "train-seq2seq --data")
def _(a: Arena) -> Try:
    path = a.here / "pairs.tsv.gz"
    path.write_bytes(gzip.compress(PAIRS.encode()))
    return _trained(a, path, refused=False)


@attack(SIZES, "1.5 MB of gzip that are 3 GB of TSV")
def _(a: Arena) -> Try:
    path = a.here / "pairs.tsv.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        block = b"a\tb\n" * 2**20
        for _ in range(768):
            file.write(block)
    return _trained(a, path)


@attack(SIZES, "a TSV with lines of 1 MB")
def _(a: Arena) -> Try:
    path = a.here / "pairs.tsv"
    path.write_text("".join(f"{'ab ' * 333_333}{i}\t{'x y ' * 250_000}{i}\n" for i in range(4)))
    return _trained(a, path, says="line 1")


@attack(SIZES, "a TSV with lines of 60,000 characters, then SIGTERM")
def _(a: Arena) -> Try:
    path = a.here / "pairs.tsv"
    path.write_text("".join(f"{'ab ' * 20_000}{i}\t{'x y ' * 15_000}{i}\n" for i in range(40)))
    return _trained(a, path, signal=signal.SIGTERM, after=15.0)


@attack(SIZES, "a TSV with a hole of 3 GiB")
def _(a: Arena) -> Try:
    path = a.here / "pairs.tsv"
    path.write_text("a\tb\n")
    os.truncate(path, 3 * 2**30)
    return _trained(a, path)


@attack(SIZES, "--input is a device that never ends")
def _(a: Arena) -> Try:
    return Try(["generate", "--model", a.model(), "--input", "/dev/zero", *QUICK])
