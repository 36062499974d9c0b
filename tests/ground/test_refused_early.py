"""What can be judged without torch is refused before it is loaded, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EARLY = """
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from kvtool.app import run
for words in json.load(sys.stdin):
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = run(words)
    print(json.dumps([code, out.getvalue(), err.getvalue(), "torch" in sys.modules]))
"""
REFUSED = """
generate
generate --prompt-file none
generate --input none
generate --input blank
generate --prompt x --model none
generate --prompt x --load-cache none
generate --prompt x --chat
generate --prompt x --chat --model hostile
generate --prompt x --chat --model g2p-1x1
bench --model none
bench --text none
bench --compare none.json
bench --compare old.json --output ./old.json
generate --input lines.json --output lines.json
generate --prompt x --attention-plot a.png --save-cache a.png
verify-cache --resume kept.json --output ./kept.json
verify-cache --model none
verify-cache --target none.py:build
verify-cache --target no-name
verify-logits --model none
verify-logits --reference none.npz
train-lm --data none
train-seq2seq --data none
train-seq2seq --valid none
train-seq2seq --test none
""".strip().splitlines()


Said = tuple[int, str, str, bool]  # exit code, stdout, stderr, whether torch is loaded by now


def refused(folder: Path, *commands: str) -> list[Said]:
    """What commands say one after another, in a process that has not loaded torch."""
    given = json.dumps([command.split() for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", EARLY], input=given, stdout=subprocess.PIPE, text=True, cwd=folder
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Said]:
    folder = tmp_path_factory.mktemp("early")
    (folder / "blank").write_text("\n")
    hostile = folder / "hostile"
    hostile.mkdir()
    (hostile / "chat_template.jinja").write_text("{{ 'x' * 10**10 }}")
    shipped = Path(__file__).parents[2] / "weights" / "shakespeare-2l" / "tokenizer.json"
    (hostile / "tokenizer.json").write_bytes(shipped.read_bytes())
    return dict(zip(REFUSED, refused(folder, *REFUSED), strict=True))


@pytest.mark.parametrize("words", REFUSED)
def test_what_can_be_judged_without_torch_is_refused_before_it_is_loaded(
    early: dict[str, Said], words: str
) -> None:
    code, out, err, loaded = early[words]
    assert (code, out, loaded) == (2, "", False), err
    assert err.startswith("kvtool: error: ") and err.count("\n") == 1


def test_a_refusal_that_needs_torch_is_told_from_the_others(tmp_path: Path) -> None:
    ((*_, loaded),) = refused(tmp_path, "generate --prompt x --top-k 999999")
    assert loaded
