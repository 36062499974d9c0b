"""The device, the number format, the threads, and how much memory there is."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvtool.config import DTYPES, RunConfig
from kvtool.core import machine
from kvtool.errors import CapacityError, DeviceError

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    kept = torch.get_num_threads()
    yield
    torch.set_num_threads(kept)


class Files:
    """What the kernel would say of memory; a file that is not given does not exist."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
        self.texts = texts
        monkeypatch.setattr(Path, "read_text", lambda path, **_: self.read(path))

    def read(self, path: Path) -> str:
        try:
            return self.texts[path.name.replace(".", "_")]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "No such file", str(path)) from None


MEMINFO = "MemTotal:       16000000 kB\nMemFree:  5 kB\nMemAvailable:    8388608 kB\n"
LIMITED = {"memory_max": f"{4 * GIB}\n", "memory_current": f"{3 * GIB}\n"}
STAT = f"anon {GIB}\nfile {GIB}\nshmem 0\n"


# Device, format, threads


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_asked_for_is_what_is_used(dtype: str) -> None:
    device, found = machine.prepare(RunConfig(device="cpu", dtype=dtype, threads=1))
    assert (device, found) == (CPU, getattr(torch, dtype)) and torch.get_num_threads() == 1


def test_without_a_number_of_threads_it_stays_as_it_is() -> None:
    torch.set_num_threads(1)
    machine.prepare(RunConfig(device="cpu"))
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("chosen", ["", "7"])
def test_threads_spin_briefly_unless_the_user_says_how_long(chosen: str) -> None:
    given = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    given |= {"GOMP_SPINCOUNT": chosen} if chosen else {}
    line = "import os, sys, kvtool; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", line], env=given, capture_output=True, text=True)
    assert run.stdout.split() == [chosen or "10000", "False"]


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_random_numbers_begin_at_the_seed(seed: int) -> None:
    config = RunConfig(device="cpu", seed=seed)
    machine.prepare(config)
    first = torch.rand(3)
    machine.prepare(config)
    assert torch.equal(first, torch.rand(3))
    machine.prepare(dataclasses.replace(config, seed=1))
    assert not torch.equal(first, torch.rand(3))


@pytest.mark.parametrize(
    ("name", "has_cuda", "found"),
    [("auto", False, "cpu"), ("cpu", False, "cpu"), ("auto", True, "cuda"), ("cpu", True, "cpu"),
     ("cuda", True, "cuda")],
)  # fmt: skip
def test_auto_is_the_gpu_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, name: str, has_cuda: bool, found: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    assert machine.choose_device(name) == torch.device(found)


def test_a_missing_gpu_is_never_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"--device cuda: .*\(found cpu\)\. Use --device cpu"):
        machine.prepare(RunConfig(device="cuda"))


def test_a_format_that_the_device_cannot_compute_with_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("\"layer_norm\" not implemented for 'Half'\nmore")

    monkeypatch.setattr(torch.nn.functional, "layer_norm", fail)
    with pytest.raises(DeviceError) as caught:
        machine.prepare(RunConfig(device="cpu", dtype="float16"))
    assert str(caught.value) == (
        "--dtype float16: cpu cannot compute with it (\"layer_norm\" not implemented for 'Half'). "
        "Use --dtype float32."
    )


# Seeds


def test_seeds_of_steps_are_what_torch_takes_and_all_different() -> None:
    seeds = [machine.derived_seed(seed, i) for seed in (0, 1, 2**63 - 1) for i in range(1000)]
    assert len(set(seeds)) == len(seeds) and 0 <= min(seeds) <= max(seeds) < 2**63
    assert machine.derived_seed(3, 5) == 3_000_014  # runs of before stay what they were
    for seed in seeds:
        torch.Generator().manual_seed(seed)


# Memory


def test_memory_is_what_the_kernel_calls_available(monkeypatch: pytest.MonkeyPatch) -> None:
    Files(monkeypatch, meminfo=MEMINFO)
    assert machine.available_bytes(CPU) == 8 * GIB


def test_a_container_has_what_its_limit_leaves_and_its_page_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Files(monkeypatch, meminfo=MEMINFO, memory_stat=STAT, **LIMITED)
    assert machine.available_bytes(CPU) == 2 * GIB


def test_a_container_without_a_limit_has_what_the_machine_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Files(monkeypatch, meminfo=MEMINFO, memory_stat=STAT, **{**LIMITED, "memory_max": "max\n"})
    assert machine.available_bytes(CPU) == 8 * GIB


@pytest.mark.parametrize("texts", [{}, {"meminfo": "MemAvailable: much kB\n"}, {"meminfo": ""}])
def test_where_nobody_says_how_much_there_is_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, texts: dict[str, str]
) -> None:
    Files(monkeypatch, **texts)
    assert machine.available_bytes(CPU) is None
    machine.require_memory("weights", 2**60, CPU)


def test_more_memory_than_there_is_is_refused_with_both_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Files(monkeypatch, meminfo=MEMINFO)
    machine.require_memory("weights", 8 * GIB, CPU)
    with pytest.raises(CapacityError, match=r"^weights: needs 8\.5 GiB \(8 GiB available\)\. "):
        machine.require_memory("weights", int(8.5 * GIB), CPU)


@pytest.mark.parametrize(
    ("dtype", "lower"),
    [(torch.float64, True), (torch.float32, True), (torch.bfloat16, False), (None, False)],
)
def test_a_smaller_dtype_is_advised_only_where_it_would_help(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None, lower: bool
) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda device: 1)
    with pytest.raises(CapacityError) as caught:
        machine.require_memory("weights", 2, CPU, dtype=dtype)
    assert ("--dtype" in caught.value.hint) == lower


def test_this_machine_says_how_much_memory_it_has() -> None:
    available = machine.available_bytes(CPU)
    assert available is None or 2**20 < available < 2**50


def test_a_gpu_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 80 * GIB))
    assert machine.available_bytes(torch.device("cuda")) == 5


def test_a_processor_with_the_instructions_multiplies_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for features, has in (
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda f=features: f, raising=False)
        assert machine.multiplies_bfloat16(CPU) is has
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as before PyTorch 2.11
    assert machine.multiplies_bfloat16(CPU) is False


def test_a_limit_of_the_process_counts_what_it_has_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    Files(monkeypatch, meminfo=MEMINFO, statm=f"{GIB // resource.getpagesize()} 5 5 0 0 0 0\n")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (6 * GIB, 6 * GIB))
    assert machine.available_bytes(CPU) == 5 * GIB - machine.RESERVED
    monkeypatch.setattr(resource, "getrlimit", lambda which: (GIB, GIB))
    assert machine.available_bytes(CPU) == 0
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert machine.available_bytes(CPU) == 8 * GIB


@pytest.mark.parametrize(
    ("own", "limits"),
    [
        ("0::/a/b\n", {"/sys/fs/cgroup/a": ("memory.max", "memory.current")}),
        ("0::/a/b\n", {"/sys/fs/cgroup/a/b": ("memory.max", "memory.current")}),
        (
            "4:cpu,memory:/a\n0::/\n",
            {"/sys/fs/cgroup/memory/a": ("memory.limit_in_bytes", "memory.usage_in_bytes")},
        ),
        (
            "4:memory:/elsewhere\n",
            {"/sys/fs/cgroup/memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")},
        ),
    ],
)
def test_the_limit_of_each_group_around_the_process_counts(
    monkeypatch: pytest.MonkeyPatch, own: str, limits: dict[str, tuple[str, str]]
) -> None:
    texts = {"/proc/self/cgroup": own, "/proc/meminfo": MEMINFO}
    for folder, (limit, used) in limits.items():
        texts |= {f"{folder}/{limit}": f"{4 * GIB}\n", f"{folder}/{used}": f"{3 * GIB}\n"}
        texts[f"{folder}/memory.stat"] = f"file {GIB // 2}\ntotal_cache {GIB // 2}\n"

    def read(path: Path, **_: str) -> str:
        if str(path) not in texts:
            raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
        return texts[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert machine.available_bytes(CPU) == 3 * GIB // 2


def test_naming_the_commit_writes_nothing_into_the_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from kvtool.ui import environment

    def git(*words: str) -> str:
        made = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(made, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    (tmp_path / "a").write_text("a")
    git("init"), git("add", "a"), git("commit", "-m", "a")
    head = git("rev-parse", "HEAD").strip()
    monkeypatch.setattr(environment, "PACKAGE", tmp_path / "kvtool")
    os.utime(tmp_path / "a", (1, 1))  # git looks again, and would note that it did
    index = (tmp_path / ".git" / "index").read_bytes()
    assert environment.commit() == head
    assert (tmp_path / ".git" / "index").read_bytes() == index
    (tmp_path / "a").write_text("b")
    assert environment.commit() == f"{head}-dirty"
