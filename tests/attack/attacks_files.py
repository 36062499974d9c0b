"""Attacks by single files: saved caches, references, baselines, data, and folders of runs."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arena import Arena, Try, attack, edit, header_of, safetensors_of
from attacks_models import CODE, PICKLES, QUICK, SAY, SIZES, SOUND, TWICE, archive, bomb
from subjects import PAIRS, RUN

BENCH = ["--lengths", "4", "--caches", "dynamic", "--threads", "1"]
CACHES = "Caches of another model"
NUMBERS = "Numbers that are none"
LINKS = "Links within a run"
LOGS = "Logs and states that are not a run's"


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


@attack(CACHES, "token ids beyond the vocabulary")
def _(a: Arena) -> Try:
    path = a.file("c.safetensors")
    header, data = header_of(path)
    ids = json.loads(header["__metadata__"]["ids"])
    header["__metadata__"]["ids"] = json.dumps([10**6, *ids[1:]])
    path.write_bytes(safetensors_of(header, data))
    return _cached(a, a.model())


@attack(CACHES, "token ids nested 100,000 deep")
def _(a: Arena) -> Try:
    path = a.file("c.safetensors")
    header, data = header_of(path)
    header["__metadata__"]["ids"] = "[" * 100_000
    path.write_bytes(safetensors_of(header, data))
    return _cached(a, a.model())


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
    with zipfile.ZipFile(path, "a") as archive:
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

for bad in (float("nan"), float("inf"), -1.0, "fast", None, [], 1e400):

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


# --- runs


def _resumed(a: Arena, **options: Any) -> Try:
    return Try([*RUN, "3", "--resume"], cwd=a.here, **options)


@attack(SOUND, "train-seq2seq --resume")
def _(a: Arena) -> Try:
    a.run()
    return _resumed(a, refused=False)


for name in (".lock", "log.jsonl", "run.json", "loss.png", "last/config.json"):

    def _linked(a: Arena, name: str = name) -> Try:
        path, other = a.run() / name, a.here / "other"
        other.write_bytes(path.read_bytes() if path.exists() else b"")
        before = other.read_bytes()
        path.unlink(missing_ok=True)
        path.symlink_to(other)

        def held(ended: Any) -> str:
            return "" if other.read_bytes() == before else "what it links to was written"

        return _resumed(a, refused=None if name == "loss.png" else True, held=held)

    attack(LINKS, f"{name} is a link to a file elsewhere")(_linked)


for name in ("last", "best"):

    def _folder(a: Arena, name: str = name) -> Try:
        run, other = a.run(), a.model(called="other")
        before = {p.name: p.read_bytes() for p in other.iterdir()}
        shutil.rmtree(run / name)
        (run / name).symlink_to(other)

        def held(ended: Any) -> str:
            after = {p.name: p.read_bytes() for p in other.iterdir()}
            return "" if after == before else "a model elsewhere was overwritten"

        return _resumed(a, says="link", held=held)

    attack(LINKS, f"{name} is a link to another model's folder")(_folder)


@attack(LINKS, "log.jsonl is a hard link to a file elsewhere")
def _(a: Arena) -> Try:
    path = a.run() / "log.jsonl"
    path.unlink()
    os.link(a.canary, path)
    return _resumed(a, refused=None)


@attack(LINKS, "a state is a link to a file elsewhere")
def _(a: Arena) -> Try:
    run = a.run()
    state = sorted(run.glob("state-*.pt"))[-1]
    state.rename(a.here / "moved.pt")
    state.symlink_to(a.here / "moved.pt")
    return _resumed(a, says="link")


@attack(LINKS, ".benchmarks/kvtool is a link to another folder")
def _(a: Arena) -> Try:
    other = a.here / "other"
    other.mkdir()
    (a.here / ".benchmarks").mkdir()
    (a.here / ".benchmarks" / "kvtool").symlink_to(other)
    argv = ["bench", "--model", a.model(), *BENCH]
    return Try([*argv, "--save", "x"], says="link",
               held=lambda e: "written elsewhere" if any(other.iterdir()) else "")  # fmt: skip


@attack(LINKS, ".benchmarks/kvtool/NAME.json is a link to a file elsewhere")
def _(a: Arena) -> Try:
    folder = a.here / ".benchmarks" / "kvtool"
    folder.mkdir(parents=True)
    (folder / "x.json").symlink_to(a.canary)
    argv = ["bench", "--model", a.model(), *BENCH]
    return Try([*argv, "--save", "x"], refused=None)


@attack(LINKS, "a FIFO is the log of a run")
def _(a: Arena) -> Try:
    path = a.run() / "log.jsonl"
    path.unlink()
    os.mkfifo(path)
    return _resumed(a)


@attack(LINKS, "a FIFO is the lock of a run")
def _(a: Arena) -> Try:
    path = a.run() / ".lock"
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return _resumed(a)


for line in (
    '{"step": true}', '{"step": 1e99}', '{"step": -5, "loss": "x"}', '{"step": 1, "loss": [1]}',
    '{"step": 1, "loss": NaN}', '{"step": 1, "valid": 7}', '{"step": ' + "9" * 5000 + "}",
    "[" * 100_000, '{"step": 1, "seconds": "a", "tokens": {}}',
):  # fmt: skip

    def _line(a: Arena, line: str = line) -> Try:
        path = a.run() / "log.jsonl"
        path.write_text(path.read_text() + line + "\n")
        return _resumed(a, refused=None)

    attack(LOGS, f"a line of the log: {line[:30]}")(_line)


def _with_state(a: Arena, state: Any) -> Try:
    run = a.run()
    for old in run.glob("state-*.pt"):
        old.unlink()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:16]
    (run / f"state-000000002-{digest}.pt").write_bytes(buffer.getvalue())
    return _resumed(a)


for what, state in (
    ("empty", {}), ("a list", [1, 2]), ("of wrong types", {"model": 1, "optimizer": "x"}),
):  # fmt: skip
    attack(LOGS, f"a state that is {what}")(lambda a, state=state: _with_state(a, state))


@attack(PICKLES, "a key of 60 doubled tuples in a state of a run")
def _(a: Arena) -> Try:
    run = a.run()
    for old in run.glob("state-*.pt"):
        old.unlink()
    archive(a.here / "bomb.pt", bomb(60))
    digest = hashlib.sha256((a.here / "bomb.pt").read_bytes()).hexdigest()[:16]
    (a.here / "bomb.pt").rename(run / f"state-000000002-{digest}.pt")
    return _resumed(a)


class _Opens:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@attack(CODE, "a state of a run is a pickle that runs")
def _(a: Arena) -> Try:
    return _with_state(a, {"model": _Opens(a.trap)})
