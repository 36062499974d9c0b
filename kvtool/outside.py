"""What stands in the folder that the user is in, or where others may write, is not taken for ours.

Libraries look around for settings of their own: numba for .numba_config.yaml, matplotlib for
matplotlibrc, an interpreter that is started with -c for modules. A model's folder that somebody
handed over may hold such files. And code that is kept is run when it is read. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

STAND = Path(__file__).resolve().parent / "data"  # of kvtool's own, without a module or setting


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Stand in a folder of kvtool's own, for a library that looks around where it is imported.

    All threads stand there meanwhile. The way back is a descriptor, and no name: the user's folder
    may have been moved, or removed.
    """
    try:
        back = os.open(".", getattr(os, "O_PATH", os.O_RDONLY) | os.O_CLOEXEC)
    except OSError:  # where nobody may look, nothing can be found
        yield
        return
    try:
        os.chdir(STAND)
        yield
    finally:
        os.fchdir(back)
        os.close(back)


def made_private(folder: Path) -> str:
    """Make `folder`, for its owner alone, with those above it -> why it cannot be trusted with code
    that is run when it is read, or "".

    As OpenSSH has it of keys (StrictModes): it and all above belong to the user or to root, and
    nobody else can write there; above it, a folder like /tmp, where each keeps his own, will do.
    """
    try:
        folder.parent.mkdir(0o755, parents=True, exist_ok=True)
        folder.mkdir(0o700, exist_ok=True)
        real = Path(os.path.realpath(folder))
        found = os.lstat(real)
        if not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
            return f"others can reach {folder}"
        for above in (real, *real.parents):
            if why := _of_others(above, os.lstat(above)):
                return why
        tempfile.TemporaryFile(dir=real).close()  # or a read-only disk would say yes
    except (OSError, ValueError) as error:
        return f"{folder}: {getattr(error, 'strerror', None) or error}"
    return ""


def _of_others(folder: Path, found: os.stat_result) -> str:
    if found.st_uid not in (0, os.geteuid()):
        return f"{folder} belongs to another user"
    if found.st_mode & stat.S_ISVTX:
        return ""
    if found.st_mode & 0o002 or (found.st_mode & 0o020 and not _is_own(found.st_gid)):
        return f"others can write to {folder}"
    return ""


def _is_own(group: int) -> bool:
    """Whether nobody else is in a group: many systems give each user one of his name."""
    import grp
    import pwd

    try:
        name, members = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return members.gr_name == name and set(members.gr_mem) <= {name}
