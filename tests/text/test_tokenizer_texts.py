"""Rules of a tokenizer of which only the text brings out that they go too far."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from cli_probe import HANGS
from kvtool.core.text.calls import LibraryCall
from kvtool.core.text.rules import MAX_CHARACTERS
from kvtool.core.text.tokenizer import Tokenizer
from kvtool.errors import KvtoolError, UsageError
from tokenizer_cases import (
    A_TEXT,
    TEXT,
    Spec,
    charsmap,
    replace,
    special,
    split_by,
    template,
    written,
)

BEES = {"normalizer": replace("a", "b" * 60)}


@pytest.mark.parametrize(
    "encode",
    [
        lambda tokenizer, text: tokenizer.encode(text),
        lambda tokenizer, text: tokenizer.encode(text, spelled=True),
        lambda tokenizer, text: tokenizer.encode_batch(["a", text]),
        lambda tokenizer, text: tokenizer.encode_pieces([("a", True), (text, False)]),
        lambda tokenizer, text: tokenizer.encode_pieces([(text[:10], False)] * (len(text) // 10)),
        lambda tokenizer, text: tokenizer.unknown(text),
    ],
    ids=["text", "spelled", "batch", "pieces", "small pieces", "unknown"],
)
def test_rules_that_make_too_much_of_a_long_text_are_not_run_on_all_of_it(
    tmp_path: Path, encode: Callable[[Tokenizer, str], object]
) -> None:
    tokenizer = Tokenizer.load(written(tmp_path, BEES))
    assert tokenizer.has_specials
    with pytest.raises(UsageError) as caught:
        encode(tokenizer, "a" * 100_000)
    said = str(caught.value)
    assert said.startswith(f"{tokenizer.path}: its rules make more than 4,194,304 characters of")
    assert "\n" not in said


def test_a_long_text_of_which_such_rules_make_little_is_encoded(tmp_path: Path) -> None:
    path = written(tmp_path, BEES)
    text = "c " * 100_000
    expected = tokenizers.Tokenizer.from_file(str(path)).encode(text).ids
    tokenizer = Tokenizer.load(path).as_it_is(frozenset())
    assert tokenizer.encode(text) == expected
    assert tokenizer.encode_batch([text]) == [expected]


def test_texts_are_encoded_together_as_far_as_the_rules_allow(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(written(tmp_path, BEES))
    inner, together = tokenizer._inner, []

    class Watched:
        def encode_batch(self, texts: list[str], **options: Any) -> Any:
            together.append(sum(map(len, texts)))
            return inner.encode_batch(texts, **options)

    tokenizer._inner = Watched()
    assert len(tokenizer.encode_batch(["a" * 100] * 1000)) == 1000
    assert len(together) > 1 and max(together) * 60 * 4 <= MAX_CHARACTERS + 100 * 60 * 4


@pytest.mark.parametrize(
    ("change", "text", "said"),
    [
        (split_by({**replace("(a+)+$", "", "Regex"), "type": "Split", "behavior": "Isolated",
                   "invert": False}), "a" * 40 + "b", "retry-limit-in-match over"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, TEXT, "chunk size must be"),
        (charsmap(b"\xff" * 64, b"abc\0"), TEXT, "index out of bounds"),
        (template(special("nobody"), A_TEXT), TEXT, "no entry found for key"),
    ],
)  # fmt: skip
def test_a_panic_of_the_library_is_one_line_and_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], change: Spec, text: str, said: str
) -> None:
    path = written(tmp_path, change)
    tokenizer = Tokenizer.load(path).as_it_is(frozenset())
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UsageError) as caught:
            encode(text)
        assert str(caught.value).startswith(f"{path}: the text cannot be encoded (")
        assert said in str(caught.value) and "\n" not in str(caught.value)
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"


def test_a_panic_while_decoding_is_one_line_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    strip = {"type": "Strip", "content": "a", "start": 0, "stop": 5}
    path = written(tmp_path, {"decoder": strip})
    tokenizer = Tokenizer.load(path)
    (a,) = tokenizer.encode("a")
    for decode in (tokenizer.decode, lambda ids: tokenizer.stream().step(ids[0])):
        with pytest.raises(UsageError, match="the text cannot be decoded"):
            decode([a])
    assert capfd.readouterr().err == ""


def test_only_errors_are_taken_for_failures_of_the_library() -> None:
    def failed(said: str) -> KvtoolError:
        return UsageError(said)

    with pytest.raises(KeyboardInterrupt), LibraryCall(failed, careful=True):
        raise KeyboardInterrupt
    with pytest.raises(UsageError, match=r"^one$"), LibraryCall(failed, careful=True):
        raise ValueError("one\ntwo")
    with LibraryCall(failed, careful=True):
        assert signal.getsignal(signal.SIGTERM) is not None


SLOW = """
import sys
from pathlib import Path
from kvtool import ending
from kvtool.core.text.tokenizer import Tokenizer
ending.listen()
tokenizer = Tokenizer.load(Path(sys.argv[1]))
print("go", flush=True)
tokenizer.encode(("a" * 23 + "b") * 10_000)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_rules_that_never_end_are_ended_by_a_signal(tmp_path: Path, number: int) -> None:
    rule = {**replace("(a+)+$", "", "Regex"), "type": "Split", "behavior": "Isolated"}
    path = written(tmp_path, split_by({**rule, "invert": False}))
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "go\n"
        time.sleep(0.2)  # so that it has begun, on most machines: before, Python ends it
        process.send_signal(number)
        try:
            assert process.wait(HANGS) in (-number, -signal.SIGINT)
        finally:
            process.kill()
