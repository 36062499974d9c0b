"""What can be judged without torch is refused before it is loaded, which takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EARLY = """
import sys
from kvtool.app import run
code = run(sys.argv[1:])
sys.exit(100 if "torch" in sys.modules else code)
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


@pytest.mark.parametrize("words", REFUSED)
def test_what_can_be_judged_without_torch_is_refused_before_it_is_loaded(
    tmp_path: Path, words: str
) -> None:
    (tmp_path / "blank").write_text("\n")
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    (hostile / "chat_template.jinja").write_text("{{ 'x' * 10**10 }}")
    shipped = Path(__file__).parents[2] / "weights" / "shakespeare-2l" / "tokenizer.json"
    (hostile / "tokenizer.json").write_bytes(shipped.read_bytes())
    command = [sys.executable, "-c", EARLY, *words.split()]
    done = subprocess.run(command, input="", capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("kvtool: error: ") and done.stderr.count("\n") == 1


def test_a_refusal_that_needs_torch_is_told_from_the_others(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EARLY, "generate", "--prompt", "x", "--top-k", "999999"]
    assert subprocess.run(command, capture_output=True, cwd=tmp_path).returncode == 100
