"""The shells that Typer writes completion scripts for."""

from __future__ import annotations

from collections.abc import Iterable

from kvtool.errors import UsageError

FLAGS = ("--install-completion", "--show-completion")
SHELLS = ("bash", "zsh", "fish", "powershell", "pwsh")


def require_shell(args: Iterable[str]) -> None:
    """Raise UsageError if `args` ask for completion in a shell that is not one of SHELLS."""
    flag = next((arg for arg in args if arg in FLAGS), None)
    if flag is None:
        return
    import shellingham  # of Typer, which looks for the shell in the same way

    try:
        found = str(shellingham.detect_shell()[0])
    except shellingham.ShellDetectionFailure:
        found = "none"
    if found not in SHELLS:
        raise UsageError(
            f"{flag}: no shell that can be completed (found {found}, "
            f"expected one of {', '.join(SHELLS)})",
            "Run it from a prompt of that shell.",
        )
