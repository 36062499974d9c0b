"""The README tells the truth: its commands run, its links lead somewhere, its targets exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from kvtool import app
from kvtool.app import build_command
from kvtool.registry import COMMANDS as COMMAND_NAMES
from kvtool.registry import load

FLAGS = re.MULTILINE | re.DOTALL
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = "verify-cache --target docs/my_decoder.py:build"  # has a bug on purpose
COMMANDS = re.findall(r"^\$ kvtool (.+)$", README, flags=re.MULTILINE)

# The same commands, made short: the last value of an option counts.
SHORTER = {
    "bench": "--lengths 2 3 --repeats 1",
    "verify-cache": "--tokens 4",
    "train-lm": "--steps 2 --d-model 32 --context 64 --batch-tokens 64",
    "train-seq2seq": "--steps 2 --d-model 32 --data pairs.tsv",
    "generate": "--max-tokens 3",
}


DROPPED = {"--minutes": 2, "--lengths": 6}  # options that would contradict or outlast, with values


def shorter(command: str) -> list[str]:
    words = shlex.split(command)
    for flag, n_words in DROPPED.items():
        if flag in words:
            at = words.index(flag)
            del words[at : at + n_words]
    return [*words, *SHORTER[words[0]].split()]


def test_every_command_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("input.txt").write_text("To be, or not to be, that is the question.\n" * 200)
    Path("pairs.tsv").write_text("".join(f"{a}{b}\t{a} {b}\n" for a in "abcde" for b in "abcdefk"))
    assert len(COMMANDS) >= 7
    for command in COMMANDS:
        if command in (EXAMPLE, "verify-cache"):  # test_listings.py runs it
            continue
        assert app.run(shorter(command)) == 0, (command, capfd.readouterr().err)


def test_every_command_takes_the_options_that_all_are_said_to_take() -> None:
    found = re.search(
        r"^Every command takes (.+?) all but the training ones (.+?)\.", README, FLAGS
    )
    assert found is not None
    every, untrained = (set(re.findall(r"`(--[a-z]+)\b", part)) for part in found.groups())
    assert {"--json", "--seed"} < every and untrained == {"--model", "--dtype"}
    for name in COMMAND_NAMES:
        params = build_command(name, load(COMMAND_NAMES, name)).params
        options = {option for param in params for option in param.opts}
        assert every <= options, name
        assert name.startswith("train-") or untrained <= options, name
        assert not name.startswith("train-") or not untrained & options, name


def test_the_worked_example_is_found_and_located_as_the_readme_shows(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    assert EXAMPLE in COMMANDS
    assert app.run([*EXAMPLE.split(), "--scenarios", "decode"]) == 1
    said = " ".join(capfd.readouterr().out.split())
    for line in re.findall(r"^  (where: .+|what: .+)$", README, flags=re.MULTILINE):
        assert line in said


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"make ([a-z]+)\b", README)) - {"is"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"demo", "test", "lint", "bench", "baseline"} <= targets
    assert [name for name in targets if f"\n{name}:" not in makefile] == []


def test_the_tree_names_every_folder_and_file_of_the_core() -> None:
    tree = README.partition("## The tree")[2].partition("## Adding")[0]
    named = set(re.findall(r"[\w/]+\.py|[\w]+/", tree))
    for path in sorted((ROOT / "kvtool" / "core").glob("*.py")):
        assert path.name in named or path.name == "__init__.py", path.name
