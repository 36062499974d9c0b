"""A disk that is full loses nothing that was found: it is told first, and the error comes last."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import bench_cases
from cli_probe import HANGS, Ran
from kvtool import app
from kvtool.errors import FileError
from kvtool.ui.output import Output
from small_models import save_decoder, save_seq2seq

small_array = bench_cases.small_array
PLACE = ["--device", "cpu", "--threads", "1"]
SMALL = ["--lengths", "2", "4", "--repeats", "1", "--prompt-length", "2"]
BENCH = ["bench", "--model", "decoder", *SMALL, "--caches", "none", "static"]
GENERATE = ["generate", "--model", "decoder", "--prompt", "To be", "--max-tokens", "5"]
LOGITS = ["verify-logits", "--model", "decoder", "--against", "numpy", "--prompt", "Hear me."]
CACHE = ["verify-cache", "--model", "decoder", "--caches", "static", "--tokens", "8"]
CACHE += ["--scenarios", "decode", "crop"]
TRAIN = ["train-lm", "--data", "text", "--steps", "2", "--batch-tokens", "64", "--context", "32"]
TRAIN += ["--d-model", "16", "--heads", "2", "--layers", "1", "--vocab-size", "260", "--out", "run"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_decoder(folder / "decoder", n_layers=1)
    save_seq2seq(folder / "seq2seq")
    (folder / "text").write_text("men went to mow, went to mow a meadow.\n" * 200)
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own beside links to the models, to stand in."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """There is no space left for files of some names."""

    def make(*names: str) -> None:
        replace, opened = os.replace, Path.open

        def fail(path: Path) -> None:
            if path.name in names:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        def replace_if_there_is_space(source: Any, target: Any, **more: Any) -> None:
            fail(Path(target))
            replace(source, target, **more)

        def open_if_there_is_space(path: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
            if mode == "a+b":  # in which results are kept as they come
                fail(path)
            return opened(path, mode, *args, **more)

        monkeypatch.setattr(os, "replace", replace_if_there_is_space)
        monkeypatch.setattr(Path, "open", open_if_there_is_space)

    return make


@pytest.mark.parametrize(
    ("args", "name", "told"),
    [
        ([*BENCH, "--output", "a.json"], "a.json", "Memory was read at"),
        ([*BENCH, "--plot", "a.png"], "a.png", "Memory was read at"),
        ([*BENCH, "--save", "kept"], ".benchmarks/kvtool/kept.json", "Memory was read at"),
        ([*GENERATE, "--output", "a.txt"], "a.txt", "\n"),
        ([*GENERATE, "--output", "a.csv"], "a.csv", "\n"),
        ([*GENERATE, "--save-cache", "a.safetensors"], "a.safetensors", "\n"),
        (
            ["generate", "--model", "seq2seq", "--prompt", "fig", "--attention-plot", "a.png"],
            "a.png",
            "\n",
        ),
        ([*LOGITS, "--output", "a.md"], "a.md", "✓ rounding only: "),
        ([*LOGITS, "--save-reference", "a.safetensors"], "a.safetensors", "✓ rounding only: "),
        ([*CACHE, "--output", "a.csv"], "a.csv", "; the planted bug was found"),
        ([*CACHE, "--plot", "a.svg"], "a.svg", "; the planted bug was found"),
        ([*CACHE, "--resume", "a.jsonl"], "--resume a.jsonl", "; the planted bug was found"),
        ([*TRAIN, "--output", "a.json"], "a.json", "loss curve: run/loss.png"),
        (TRAIN, "run/loss.png", "checkpoint: run/best"),
    ],
)
def test_the_result_is_told_and_one_line_says_what_could_not_be_written(
    kv: Callable[..., Ran],
    full: Callable[..., None],
    here: Path,
    args: list[str],
    name: str,
    told: str,
) -> None:
    full(Path(name.split()[-1]).name)
    ran = kv(*args[1:], *PLACE, command=args[0])
    assert told in ran.out
    *talk, last = ran.err.splitlines()
    assert last == f"kvtool: error: {name}: cannot be written (No space left on device)"
    assert not [line for line in talk if "error" in line or "written to" in line]
    assert ran.code == 2
    assert not [path for path in here.rglob("*") if path.suffix == ".tmp"]


def test_a_saved_cache_that_was_not_written_is_not_said_to_be_there(
    kv: Callable[..., Ran], full: Callable[..., None], here: Path
) -> None:
    given = [*GENERATE[1:], *PLACE, "--save-cache", "a.safetensors"]
    assert "the prompt's cache: a.safetensors" in kv(*given, command="generate").err
    full("a.safetensors")
    assert "the prompt's cache" not in kv(*given, command="generate").err


def test_each_file_is_tried_and_each_failure_has_a_line(
    kv: Callable[..., Ran], full: Callable[..., None], here: Path
) -> None:
    full("a.json", "a.png")
    words = ["--output", "a.json", "--save", "kept", "--plot", "a.png"]
    ran = kv(*BENCH[1:], *PLACE, *words, command="bench")
    full_disk = "cannot be written (No space left on device)"
    assert ran.code == 2 and "Memory was read at" in ran.out
    saved, *failed = ran.err.splitlines()[-3:]
    assert saved == "saved: .benchmarks/kvtool/kept.json"
    assert failed == [f"warning: a.png: {full_disk}", f"kvtool: error: a.json: {full_disk}"]
    assert json.loads((here / ".benchmarks/kvtool/kept.json").read_text())["exit_code"] == 0


def test_json_is_whole_on_stdout_and_an_answer_of_no_is_exit_2(
    kv: Callable[..., Ran], full: Callable[..., None], tmp_path: Path
) -> None:
    full("a.json")
    ran = kv("--wrong", "--json", "--output", str(tmp_path / "a.json"))
    assert ran.code == 2 and json.loads(ran.out)["exit_code"] == 1
    assert ran.err.splitlines()[-1].startswith("kvtool: error: ")


@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_results_that_were_meant_for_a_file_alone_are_printed_after_all(
    kv: Callable[..., Ran], full: Callable[..., None], here: Path, suffix: str
) -> None:
    (here / "in.txt").write_text("one\ntwo\n")
    given = ["--model", "decoder", "--input", "in.txt", "--max-tokens", "5", *PLACE]
    printed = kv(*given, command="generate").out
    assert printed.count("\n") == 2
    full(f"a{suffix}")
    ran = kv(*given, "--output", f"a{suffix}", command="generate")
    assert (ran.code, ran.out) == (2, printed)


def test_a_file_to_resume_from_keeps_what_was_written_before(
    kv: Callable[..., Ran],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kvtool.core.verify.resume_log import ResumeLog

    write, lines = ResumeLog._write, []

    def fail_at_the_second(self: ResumeLog[Any], line: bytes) -> None:
        lines.append(line)
        if len(lines) > 1:
            raise FileError("a.jsonl: cannot be written (No space left on device)")
        write(self, line)

    monkeypatch.setattr(ResumeLog, "_write", fail_at_the_second)
    more = ["--scenarios", "decode", "crop", "fork"]
    ran = kv(*CACHE[1:], *PLACE, *more, "--resume", "a.jsonl", command="verify-cache")
    assert ran.code == 2 and len(lines) == 2  # nothing is added behind a gap
    monkeypatch.setattr(ResumeLog, "_write", write)
    ran = kv(*CACHE[1:], *PLACE, *more, "--resume", "a.jsonl", command="verify-cache")
    assert ran.code == 0 and "1 results are there already" in ran.err


def test_a_failure_is_told_beside_the_error_that_ended_the_work(
    kv: Callable[..., Ran], full: Callable[..., None], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvtool.core.reference import reference

    def fail(*_: object) -> None:
        raise FileError("a model: is gone")

    full("a.safetensors")
    monkeypatch.setattr(reference, "compare", fail)
    given = [*LOGITS[1:], *PLACE, "--save-reference", "a.safetensors"]
    ran = kv(*given, command="verify-logits")
    assert ran.code == 2
    assert ran.err.splitlines() == [
        "warning: a.safetensors: cannot be written (No space left on device)",
        "kvtool: error: a model: is gone",
    ]


# Streams that take no more


Start = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def start(warm_python: Callable[..., str]) -> Start:
    def call(args: Sequence[str], **streams: Any) -> subprocess.CompletedProcess[str]:
        command = [warm_python(), "-m", "kvtool", *args, *PLACE]
        return subprocess.run(command, text=True, timeout=HANGS, **streams)

    return call


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_full_stdout_does_not_cost_the_file(here: Path, start: Start, as_json: list[str]) -> None:
    with open("/dev/full", "w") as nowhere:
        given = [*GENERATE, "--output", "a.json", *as_json]
        done = start(given, stdout=nowhere, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("kvtool: error: output: no space left")
    assert json.loads((here / "a.json").read_text())["results"][0]["new_tokens"] == 5


def test_a_closed_pipe_does_not_cost_the_file_and_is_no_error(here: Path, start: Start) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = start([*GENERATE, "-q", "--output", "a.json"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
    assert json.loads((here / "a.json").read_text())["results"][0]["new_tokens"] == 5


def test_a_stream_that_is_written_nowhere_else_ends_with_its_pipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Closed:
        encoding = "utf-8"

        def isatty(self) -> bool:
            return False

        def write(self, _: str) -> None:
            raise BrokenPipeError

    out = Output()
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        out.stream("a")
    out.later(lambda report, document: None)
    out.stream("a")


def test_a_full_stderr_costs_nothing(here: Path, start: Start) -> None:
    with open("/dev/full", "w") as nowhere:
        done = start([*GENERATE, "--output", "a.json"], stdout=subprocess.PIPE, stderr=nowhere)
    assert done.returncode == 0 and done.stdout and (here / "a.json").exists()


@pytest.mark.usefixtures("signals_as_in_the_app")
def test_what_was_printed_last_is_not_lost_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "run", lambda args: print("not flushed") or 0)
    with open("/dev/full", "w") as nowhere:
        monkeypatch.setattr(sys, "stdout", nowhere)
        with pytest.raises(SystemExit) as ended:
            app.main([])
    assert ended.value.code == 2


def test_a_file_that_may_not_grow_is_like_a_full_disk(here: Path) -> None:
    """The system itself refuses to write, in a process with a limit."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))

    args = [*GENERATE, "--output", "a.json"]
    command = [sys.executable, "-B", "-m", "kvtool", *args, *PLACE]
    done = subprocess.run(
        command, text=True, timeout=HANGS, capture_output=True, preexec_fn=limit, check=False
    )
    assert done.returncode == 2 and done.stdout
    assert (
        done.stderr.splitlines()[-1] == "kvtool: error: a.json: cannot be written (File too large)"
    )
    assert not (here / "a.json").exists()
