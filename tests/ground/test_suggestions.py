"""What an error suggests for a name that is not known: commands, options and values."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cli_probe import Ran, refused
from kvtool.app import build_command
from kvtool.nearest import nearest_names
from kvtool.registry import COMMANDS, load


def options_of(command: str) -> list[str]:
    params = build_command(command, load(COMMANDS, command)).params
    return [name for param in params for name in param.opts if name.startswith("--")]


def toggled(name: str) -> str:
    return name.removesuffix("s") if name.endswith("s") else f"{name}s"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("change", [toggled, lambda name: name[1:]], ids=["plural", "one dash"])
def test_every_option_is_suggested_first_for_what_is_nearly_its_name(
    kv: Callable[..., Ran], command: str, change: Callable[[str], str]
) -> None:
    options = options_of(command)
    assert len(options) >= 7
    for option in options:
        wrong = change(option)
        if wrong in options or len(option) < 5:
            continue
        message = refused(kv(wrong, command=command))
        expected = f"{wrong}: no such option of kvtool {command}. Did you mean {option}"
        assert message.startswith(expected), message
        assert nearest_names(f"--{wrong.strip('-').replace('-', '_')}", options)[0] == option
        assert nearest_names(wrong.upper(), options)[0] == option


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_suggested_for_its_beginning(command: str) -> None:
    options = options_of(command)
    for option in options:
        begun = option[: max(5, len(option) - 3)]
        if begun in options or len(option) < 6:
            continue
        same = [name for name in options if name.startswith(begun)]
        found = nearest_names(begun, options, 9)
        assert option in found and set(same) <= set(found), begun


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("help", "Did you mean kvtool --help?"),
        ("help bench", "Did you mean kvtool bench --help?"),
        ("version", "Did you mean kvtool --version?"),
        ("gen", "Did you mean generate?"),
        ("Generate", "Did you mean generate?"),
        ("verify", "Did you mean verify-cache or verify-logits?"),
        ("train_lm", "Did you mean train-lm?"),
        ("benchmark", "Did you mean bench?"),
        ("bench --cache none", "Did you mean --caches?"),
        ("generate --caches none", "Did you mean --cache?"),
        ("generate --num-beams 4", "Did you mean --beams?"),
        ("generate --temp 0", "Did you mean --temperature?"),
        ("generate --cache dyn", "Did you mean dynamic?"),
        ("generate --cache int", "Did you mean int8 or int4?"),
        ("generate --dtype bf16", "Did you mean bfloat16?"),
    ],
)
def test_what_is_nearly_a_name_is_answered_with_the_name(
    kv: Callable[..., Ran], words: str, hint: str
) -> None:
    first, *rest = words.split()
    message = refused(kv(*rest, command=first))
    assert message.endswith(hint), message


def test_a_better_reason_hides_the_worse_ones() -> None:
    options = ["--length-penalty", "--lengths", "--prompt-length", "--depth"]
    assert nearest_names("--length", options) == ["--lengths"]
    assert nearest_names("--len", options) == ["--lengths", "--length-penalty"]
    assert nearest_names("--prompt-size", options) == ["--prompt-length"]
    assert nearest_names("--dpeth", options) == ["--depth"]


def test_what_resembles_nothing_gets_no_suggestion(kv: Callable[..., Ran]) -> None:
    assert "Did you mean" not in refused(kv(command="xyz"))
    assert refused(kv("--zzz")).endswith("See kvtool probe --help.")
    assert nearest_names("", ["a", "b"]) == nearest_names("--", ["--abc"]) == []
