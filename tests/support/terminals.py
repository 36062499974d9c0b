"""A terminal that a test looks at: what it was sent, and what of that it would obey."""

from __future__ import annotations

import os
import pty
import re
import sys
import threading
import unicodedata
from collections.abc import Callable

import pytest

# What rich and kvtool send themselves: colours, no blinking, cursors and lines of a bar.
OURS = re.compile(r"\x1b\[(?!5m)[\d;]*m|\x1b\[\?25[lh]|\r?\x1b\[1A|\r?\x1b\[2K|\r\n")
REORDERS = {"RLE", "LRE", "RLO", "LRO", "PDF", "RLI", "LRI", "FSI", "PDI"}
# A title, blinking, an erased screen in one byte, a line begun anew, letters turned, a line break.
EVIL = "\x1b]0;evil\x07\x1b[5m\x9b2J\r\u202e\u2028x"
SEEN = "\\x1b]0;evil\\x07\\x1b[5m\\x9b2J\\r\\u202e\\u2028x"


def obeyed(sent: str) -> list[str]:
    """The characters that a terminal would do something for, beyond kvtool's own."""
    return [
        letter
        for letter in OURS.sub("", sent)
        if (unicodedata.category(letter) in ("Cc", "Zl", "Zp", "Cs") and letter not in "\n\t")
        or unicodedata.bidirectional(letter) in REORDERS
    ]


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], str]:
    """What a terminal of 200 columns is sent while something runs with it as stdout and stderr."""

    def sent_by(work: Callable[[], object]) -> str:
        master, slave = pty.openpty()
        read: list[bytes] = []

        def listen() -> None:
            try:
                while data := os.read(master, 65536):
                    read.append(data)
            except OSError:  # the other end is closed
                pass

        listener = threading.Thread(target=listen)
        listener.start()
        with (
            open(slave, "w", encoding="utf-8", errors="backslashreplace") as screen,
            monkeypatch.context() as patch,
        ):
            patch.setenv("TERM", "xterm-256color")
            patch.setenv("COLUMNS", "200")
            patch.delenv("NO_COLOR", raising=False)
            patch.setattr(sys, "stdout", screen)
            patch.setattr(sys, "stderr", screen)
            work()
        listener.join()
        os.close(master)
        return b"".join(read).decode()

    return sent_by
