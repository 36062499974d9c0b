"""What a command writes is nothing that it reads: refused before work starts."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import typer

from cli_probe import Ran, refused
from family_cases import CASES, build, save
from kvtool import app
from kvtool.commands.verify.show import show
from kvtool.core.checkpoint import checkpoint
from kvtool.core.text.chat import read_template
from kvtool.core.text.tokenizer import Tokenizer
from kvtool.errors import FileError, UsageError
from kvtool.files import shipped_models, weights_folder
from kvtool.registry import COMMANDS
from kvtool.registry import load as load_entry
from kvtool.ui import apart, lists
from kvtool.ui.documents import OF_CHECKS as ALL
from kvtool.ui.output import Output, present
from report_cases import REPORTS

Command = Callable[..., Ran]
DECODER = weights_folder() / "shakespeare-2l"


def options() -> Iterator[tuple[Any, Any]]:
    """Every command's options, with the types of what they give."""
    group = typer.main.get_command(app.app)
    for name, place in COMMANDS.items():
        hints = get_type_hints(load_entry(COMMANDS, name))
        command = group.get_command(typer.Context(group), name)
        assert command is not None, place
        yield from ((param, hints.get(param.name)) for param in command.params)


def test_every_option_that_names_a_file_is_known_as_read_or_as_written() -> None:
    known = {*apart.READ, *apart.WRITTEN, apart.RUN}
    named = {
        param.opts[0]
        for param, kind in options()
        if "Path" in str(kind)
        or any(word in str(param.metavar) for word in ("FILE", "DIR", "PATH", "FOLDER"))
    }
    assert named - known == set()
    assert known - named == {"--save"}  # its file has a name alone


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder beside the user."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DECODER, tmp_path / "m")
    return tmp_path / "m"


def verify(kv: Command, *args: str) -> str:
    return refused(kv(*args, command="verify-cache"))


@pytest.mark.parametrize("flag", ["--output", "--resume"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_of_the_model_is_not_written_over(
    kv: Command, model: Path, flag: str, name: str
) -> None:
    before = {path: path.read_bytes() for path in model.iterdir()}
    os.link(model / name, "hard.json")
    os.symlink(model / name, "soft.json")
    for path in (f"m/{name}", f"./m/../m/{name}", "hard.json", "soft.json"):
        said = verify(kv, "--model", "m", flag, path)
        assert said.startswith(f"{flag} ")
        assert said.endswith("is a file of --model too, which would be lost. Give another file.")
    assert {path: path.read_bytes() for path in model.iterdir()} == before


def test_nor_is_a_file_of_the_model_that_nobody_named(kv: Command) -> None:
    said = verify(kv, "--output", str(DECODER / "config.json"))
    assert "is a file of --model too" in said


def test_nor_is_a_shard_whatever_it_is_called(kv: Command, model: Path) -> None:
    (model / "model.safetensors").rename(model / "odd.json")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "odd.json", "b": 3}}')
    assert "is a file of --model too" in verify(kv, "--model", "m", "--output", "m/odd.json")


def test_nor_is_a_link_of_hugging_face_s_cache(kv: Command, model: Path) -> None:
    (model / "config.json").rename("blob.json")
    (model / "config.json").symlink_to("../blob.json")
    assert "is a file of --model too" in verify(kv, "--model", "m", "--output", "blob.json")


def test_nor_is_the_users_own_decoder(kv: Command, model: Path) -> None:
    Path("mine.py").write_text("")
    said = verify(kv, "--target", "mine.py:build", "--resume", "mine.py")
    assert said.startswith("--resume mine.py: is the file of --target too")


def test_nor_is_a_run_that_was_saved_by_name(kv: Command, model: Path) -> None:
    path = Path(".benchmarks/kvtool/a.json")
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    for flag in ("--compare", "--save"):
        said = refused(kv(flag, "a", "--output", str(path), command="bench"))
        assert said.startswith(f"--output {path}: is the file of {flag} too")


@pytest.mark.parametrize("name", ["run.json", "best/config.json", "last/x.json"])
def test_nor_is_what_training_writes(kv: Command, model: Path, name: str) -> None:
    Path("run").mkdir()
    Path("text").write_text("x" * 999)
    given = ["--data", "text", "--out", "run", "--output", f"run/{name}"]
    said = refused(kv(*given, command="train-lm"))
    assert said.startswith(f"--output run/{name}: is a file of --out too")


def test_nor_does_training_write_over_its_data(kv: Command, model: Path) -> None:
    Path("run").mkdir()
    Path("run/log.jsonl").write_text("x" * 999)
    said = refused(kv("--data", "run/log.jsonl", "--out", "run", "--resume", command="train-lm"))
    assert said.startswith("--data run/log.jsonl: is a file of --out too")


def test_a_new_file_in_the_models_folder_is_written_and_again(kv: Command, model: Path) -> None:
    for _ in range(2):
        given = ["--model", "m", "--prompt", "x", "--max-tokens", "1"]
        ran = kv(*given, "--output", "m/report.json", command="generate")
        assert ran.code == 0, ran.err


def opened_in(folder: Path, work: Callable[[], object]) -> set[Path]:
    """The files of a folder that Python opens meanwhile."""
    found: set[Path] = set()
    watching = [True]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if watching and event == "open" and isinstance(args[0], (str, Path)):
            path = Path(args[0])
            if path.parent == folder and path.is_file():
                found.add(path)

    sys.addaudithook(watch)
    work()
    watching.clear()
    return found


def load(folder: Path) -> Callable[[], object]:
    return lambda: checkpoint.load(str(folder), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", shipped_models())
def test_every_file_that_loading_opens_is_one_that_is_not_written_over(name: str) -> None:
    folder = weights_folder() / name
    opened = opened_in(folder, load(folder))
    assert len(opened) > 2 and opened <= set(apart.READ["--model"](folder))


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "10KB"}])
def test_nor_one_of_a_folder_that_transformers_wrote(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    folder = save(build(CASES["llama"]), tmp_path, **options)
    Tokenizer.train("char", ["ab"]).save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        (folder / name).write_text("{}")

    def work() -> None:
        load(folder)()
        read_template(folder)

    opened = opened_in(folder, work)
    assert len(opened) > 4 and opened <= set(apart.READ["--model"](folder))


def several(report: Any, *paths: Path) -> None:
    """Present a report with several files."""
    with pytest.raises(typer.Exit):
        present("verify-cache", {}, lambda *_: report, show, Output(False, paths, True, False, ALL))


def test_a_check_writes_several_files_each_in_its_format(tmp_path: Path) -> None:
    names = {"r.xml": b"<?xml", "r.html": b"<!DOCTYPE html>", "r.json": b"{", "r.md": b"# kvtool"}
    several(REPORTS["bug"][1], *(tmp_path / name for name in names))
    for name, start in names.items():
        assert (tmp_path / name).read_bytes().startswith(start)


def test_a_file_that_cannot_be_written_costs_no_other(tmp_path: Path) -> None:
    first, second = tmp_path / "r.json", tmp_path / "gone" / "r.md"
    second.parent.mkdir()
    out = Output(False, [second, first], True, False, ALL)
    second.parent.rmdir()
    with pytest.raises(FileError, match="gone"):
        present("verify-cache", {}, lambda *_: REPORTS["bug"][1], show, out)
    assert first.exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--output", "r.xml", "--output", "./r.xml"], "is the file of --output too"),
        (["--output", "r.json", "--output", "r.gif"], "--output r.gif: unknown format"),
        (["--output", "r.json", "--output", ""], "--output: is empty"),
        (["--output=a.json", "--plot", "a.png", "--plot=b.png"], "--plot: is given twice"),
    ],
)
def test_files_that_would_not_all_be_written_are_refused(
    kv: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    said = verify(kv, *more)
    assert words in said
    assert not list(tmp_path.iterdir())


def test_a_value_that_looks_like_a_flag_is_no_second_one() -> None:
    lists.refuse_repeated(["--prompt", "--plot", "--plot", "a"], ["--plot"], {"--prompt": 1})
    with pytest.raises(UsageError, match="--plot: is given twice"):
        lists.refuse_repeated(["--plot", "a", "--plot=b"], ["--plot"], {"--plot": 1})
