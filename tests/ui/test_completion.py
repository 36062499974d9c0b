"""Completion in bash, installed and used as a user does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvtool.errors import UsageError
from kvtool.ui import completion

KVTOOL = f'exec "{sys.executable}" -m kvtool "$@"\n'
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with `kvtool` in its bin."""
    command = tmp_path / "bin" / "kvtool"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\n{KVTOOL}")
    command.chmod(0o755)
    return tmp_path


def shell(home: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run `script` in a bash that stays the parent of what it calls."""
    path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", f"{script}\nexit $?"],
        env={**os.environ, "HOME": str(home), "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_completion_that_is_installed_completes(home: Path) -> None:
    installed = shell(home, "kvtool --install-completion")
    assert (installed.returncode, installed.stderr) == (0, "")
    assert "bash completion installed in" in installed.stdout
    words = "COMP_WORDS=(kvtool generate --cache dyn); COMP_CWORD=3"
    call = '_kvtool_completion kvtool; echo "${COMPREPLY[@]}"'
    completed = shell(home, f"source ~/.bashrc; {words}; {call}")
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, "dynamic\n", "")


def test_the_completion_is_shown_as_it_is_installed(home: Path) -> None:
    shown = shell(home, "kvtool --show-completion")
    assert (shown.returncode, shown.stderr) == (0, "")
    shell(home, "kvtool --install-completion")
    assert shown.stdout.strip() == (home / ".bash_completions/kvtool.sh").read_text().strip()


def test_a_completion_that_cannot_be_written_is_one_line_and_exit_2(home: Path) -> None:
    (home / ".bash_completions").write_text("not a folder")
    refused = shell(home, "kvtool --install-completion")
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.count("\n") == 1
    assert refused.stderr.startswith(f"kvtool: error: {home / '.bash_completions'}: cannot be ")


def test_a_shell_without_completion_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import shellingham

    monkeypatch.setattr(shellingham, "detect_shell", lambda: ("dash", "/bin/dash"))
    with pytest.raises(UsageError, match=r"--show-completion: no shell .*\(found dash, expected"):
        completion.require_shell(["--show-completion"])

    def fail() -> None:
        raise shellingham.ShellDetectionFailure

    monkeypatch.setattr(shellingham, "detect_shell", fail)
    with pytest.raises(UsageError, match="found none"):
        completion.require_shell(["--install-completion"])
    completion.require_shell(["--help"])
