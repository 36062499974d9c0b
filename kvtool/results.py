"""`kvtool.verify` and `kvtool.generate`, whose results show themselves in a notebook."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property, wraps
from itertools import accumulate
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from kvtool.commands.verify.report import CacheReport, Row
from kvtool.commands.verify.show import has_gaps, panels_of, show
from kvtool.core.decoding import generation
from kvtool.core.verify import api
from kvtool.core.verify.check import planted_bug
from kvtool.core.verify.target.check import OWN
from kvtool.errors import UsageError
from kvtool.ui.documents import jsonable
from kvtool.ui.inert import in_a_line
from kvtool.ui.options import require_plot_format
from kvtool.ui.page import Told, line, picture, table
from kvtool.ui.plots import gap_plot

SHOWN = 60  # letters of a text in a repr


class Plot:
    """A plot that a notebook draws where it is the last value of a cell."""

    def __init__(self, svg: str, about: str) -> None:
        self.svg, self.about = svg, about

    def __repr__(self) -> str:
        return f"<Plot: {self.about}>"

    def _repr_html_(self) -> str:
        return self.svg


class Verification(api.Verification):
    """The result of `kvtool.verify`: true if something was checked, all of it is right, and the
    planted bug was found. str() gives the evidence."""

    @cached_property
    def report(self) -> CacheReport:
        """The report that the command would make of it."""
        planted = Row.of(planted_bug(self.control, OWN))
        return CacheReport([Row.of(checked) for checked in self.checked], planted, 0, self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON's types; `checks` has the fields of the command's document."""
        facts = ("name", "dtype", "guess", "ok", "verdict", "conclusion")
        found = {name: getattr(self, name) for name in facts}
        return jsonable({**found, "checks": self.report.checks, "control": self.report.control})

    def plot(self, path: str | Path | None = None) -> Plot:
        """Draw the gap of each step of the scenario decode in each precision; a path gets a file of
        it too, .png, .svg or .pdf. Raises UsageError if decode was not compared and for another
        format, and FileError."""
        if path is not None:
            require_plot_format(Path(path), "plot")
        panels = panels_of(self.report)
        if not any(map(has_gaps, self.report.checks)):
            raise UsageError("plot: there is no gap to draw", "Verify the scenario decode.")
        title = f"Cached against uncached logits, by step\n{self.name}, {self.dtype}"
        if path is not None:
            gap_plot(Path(path), panels, title)
        return Plot(picture(lambda _, file: gap_plot(file, panels, title), None), self.name)

    def _repr_html_(self) -> str:
        told = Told(sorts=False)
        show(self.report, told)  # type: ignore[arg-type]
        first = f"<p><b>{line(self.verdict)}</b> ({line(self.conclusion)})</p>"
        return "\n".join([first, *told.texts, *told.tables])


class Generated(generation.Generated):
    """The result of `kvtool.generate`: the `n_best` continuations of each prompt, prompt by prompt,
    the best first."""

    def __repr__(self) -> str:
        if not self.results:
            return "<Generated: nothing>"
        said = in_a_line(self.text) or " ".join(map(str, self.ids))
        more = f", and {len(self.results) - 1} more" if len(self.results) > 1 else ""
        cut = said if len(said) <= SHOWN else f"{said[:SHOWN]}..."
        return f"<Generated: {cut!r}, {len(self.ids)} tokens{more}>"

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        return jsonable(dataclasses.asdict(self))

    def _repr_html_(self) -> str:
        names = ["rank", "text", "tokens", "log-probability, nats", "ended"]
        rows = [
            [
                str(found.rank), found.text or " ".join(map(str, found.ids)), str(len(found.ids)),
                f"{found.log_prob:.2f}", "by an end token" if found.ended else "by the limit",
            ]
            for found in self.results
        ]  # fmt: skip
        prompts = list(accumulate(int(found.rank == 1) for found in self.results))
        if prompts and prompts[-1] > 1:  # else a rank would not tell whose it is
            names = ["prompt", *names]
            rows = [[str(n), *row] for n, row in zip(prompts, rows, strict=True)]
        return table(names, rows, sorts=False)


Given = ParamSpec("Given")
Found = TypeVar("Found")


def _returning(
    kind: Callable[..., Found], function: Callable[Given, Any]
) -> Callable[Given, Found]:
    """The function, with its signature and docstring; its result as one of `kind`."""

    @wraps(function)
    def call(*given: Given.args, **options: Given.kwargs) -> Found:
        found = function(*given, **options)
        fields = dataclasses.fields(found)
        return kind(**{each.name: getattr(found, each.name) for each in fields})

    return call


verify = _returning(Verification, api.verify)
generate = _returning(Generated, generation.generate)
