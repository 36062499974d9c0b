"""Options that contradict or need each other: what every command's table says is what happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cli_probe import Ran, refused
from kvtool.commands import evaluate
from kvtool.commands.bench import settings as bench
from kvtool.commands.generate import settings as generate
from kvtool.commands.verify import logits
from kvtool.commands.verify import options as verify
from kvtool.errors import UsageError
from kvtool.ui.option_rules import Rule, contradicts, needs, require

TABLES = {
    "generate": [
        *generate.SEARCH,
        *generate.PROMPTS,
        *generate.CACHE_FILES,
        *generate.DRAWING,
    ],
    "verify-cache": [verify.OF_THE_SELF_TEST, *verify.RULES, verify.OF_A_TARGET],
    "verify-logits": [*logits.RULES],
    "bench": [*bench.RULES],
    "evaluate": [*evaluate.RULES],
}
SWITCHES = (
    "--self-test", "--sweep", "--chat", "--force", "--thorough", "--lossy", "--dry-run",
)  # fmt: skip
VALUES = {
    "--beams": "2",
    "--n-best": "2",
    "--length-penalty": "1",
    "--attention-layer": "1",
    "--caches": "static",
    "--kernels": "exact",
    "--dtype": "bfloat16",
    "--impl": "transformers",
    "--target": "own.py:build",
    "--plot": "a.png",
    "--input": "lines.txt",
    "--against": "numpy",
    "--fail-if": "min:1",
    **dict.fromkeys(
        ("--tokens", "--prompt-length", "--layers", "--time-limit", "--requests", "--timeout"), "9"
    ),
    **dict.fromkeys(("--window", "--sinks", "--group", "--residual", "--page"), "3"),
}
CASES = [
    pytest.param(command, flag, rule, id=f"{command}: {flag} {rule.message}")
    for command, rules in TABLES.items()
    for rule in rules
    for flag in rule.flags.split()
]


def spelled(flag: str) -> list[str]:
    """An option with a value, unless it has one or takes none."""
    words = flag.split()
    bare = len(words) > 1 or flag in SWITCHES
    return words if bare else [flag, VALUES.get(flag, "x")]


@pytest.mark.parametrize(("command", "flag", "rule"), CASES)
def test_a_rule_is_kept_by_its_command(
    kv: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: str,
    flag: str,
    rule: Rule,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("def build():\n    pass\n")
    other = spelled(rule.other) if rule.verb == "contradicts" else []
    message = refused(kv(*spelled(flag), *other, command=command))
    assert message == f"{flag}: {rule.message}. {rule.hint}"


def test_the_first_rule_that_is_broken_names_the_first_of_its_flags() -> None:
    rules = [needs("--a", "--b --c", "Add it."), contradicts("--a", "--c", "Give one.")]
    given = {"--a": False, "--b": None, "--c": "x"}
    with pytest.raises(UsageError, match=r"^--c: needs --a\. Add it\.$"):
        require(rules, given)
    with pytest.raises(UsageError, match=r"^--c: contradicts --a\. Give one\.$"):
        require(rules, {**given, "--a": 1})
    require(rules, {**given, "--a": 1, "--c": ""})


def test_a_rule_about_an_option_that_is_not_looked_at_is_a_defect() -> None:
    with pytest.raises(KeyError, match="--b"):
        require([needs("--a", "--b", "")], {"--a": False})
