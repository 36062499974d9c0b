"""matplotlib's settings while kvtool draws."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from kvtool.outside import elsewhere


@contextlib.contextmanager
def drawing(**settings: Any) -> Iterator[None]:
    """Draw with matplotlib's own defaults and these settings, so that a picture is the same
    everywhere: a matplotlibrc, beside the user or at home, could ask for LaTeX.

    For every function that draws: `@drawing()`.
    """
    with elsewhere():
        import matplotlib
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the picture has a box for it
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)  # type: ignore[arg-type]
        yield
