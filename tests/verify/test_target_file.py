"""FILE.py:NAME: what is loaded, what is refused, and the worked example."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtool.core.verify.judge import BUG, ROUNDING, Case, Judge
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.core.verify.target.doctor import examine
from kvtool.core.verify.target.file import target_subject
from kvtool.errors import FileError, KvtoolError, UsageError

EXAMPLE = Path(__file__).parents[2] / "docs" / "my_decoder.py"

FILE = """
import helper_beside_it
from torch import nn
number = 3
def build():
    raise ValueError("no weights\\nat all")
def sized(width): ...
def listed():
    return [1]
class Right:
    vocab_size, context = 5, 64
    def full(self, ids): return nn.functional.one_hot(ids % 5, 5).float()
    def step(self, ids, state): return self.full(ids), None
right = Right()
print("talk")
"""
REFUSED = [
    ("decoder.py", UsageError, "'decoder.py' is not FILE.py:NAME"),
    ("none.py:build", FileError, "none.py: there is no such file"),
    (".:build", FileError, ".: is a folder"),
    ("decoder.txt:build", FileError, "decoder.txt: is no Python file"),
    ("decoder.py:biuld", UsageError, "decoder.py: has no biuld. Did you mean build?"),
    ("decoder.py:zzz", UsageError, "has no zzz. It has build, sized, listed, Right, right."),
    ("decoder.py:build", FileError, "build() raised ValueError: no weights (line 6)"),
    ("decoder.py:sized", UsageError, "sized() cannot be called without arguments"),
    ("decoder.py:number", UsageError, "decoder.py:number: is no decoder and no function"),
    ("decoder.py:listed", UsageError, "decoder.py:listed: a list is no decoder"),
    ("broken.py:build", FileError, "importing it raised SyntaxError"),
    ("failing.py:build", FileError, "importing it raised ImportError: no such thing (line 3)"),
    ("leaving.py:build", FileError, "importing it raised SystemExit: 3 (line 1)"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "helper_beside_it.py").write_text("")
    (tmp_path / "decoder.py").write_text(FILE)
    (tmp_path / "decoder.txt").write_text(FILE)
    (tmp_path / "broken.py").write_text("def build(:\n")
    (tmp_path / "failing.py").write_text("\n\nraise ImportError('no such thing')\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("spec", "kind", "words"), REFUSED)
def test_what_cannot_be_loaded_is_said_in_one_line(
    folder: Path, spec: str, kind: type[KvtoolError], words: str
) -> None:
    with pytest.raises(KvtoolError) as caught:
        target_subject(spec)
    assert type(caught.value) is kind and caught.value.exit_code == 2
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["Right", "right"])
def test_a_class_and_an_object_are_decoders_too(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert target_subject(f"decoder.py:{name}").vocab_size == 5
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "talk\n")  # stdout is for the results


def test_the_slip_of_the_worked_example_is_found_where_it_is() -> None:
    subject = target_subject(f"{EXAMPLE}:build")
    finding = Judge(subject, examine).judge(Case(SCENARIOS["decode"]))
    assert (finding.verdict, finding.first_wrong) == (BUG, 1)
    assert finding.diagnosis.place == "pos_embedding was asked for 12, not 11"
    assert "one too high" in finding.diagnosis.hint


def test_the_worked_example_is_right_without_its_slip(tmp_path: Path) -> None:
    source = EXAMPLE.read_text(encoding="utf-8")
    assert source.count("shape[2] + 1 if") == 1
    (tmp_path / "mended_decoder.py").write_text(source.replace("shape[2] + 1 if", "shape[2] if"))
    subject = target_subject(f"{tmp_path / 'mended_decoder.py'}:build")
    finding = Judge(subject, examine).judge(Case(SCENARIOS["decode"]))
    assert (finding.verdict, finding.evidence) == (ROUNDING, "")
