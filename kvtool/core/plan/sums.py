"""What caches of a model take, what fits into a memory, and how fast a token can be at best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from kvtool.config import LARGEST_SIZE
from kvtool.core.cache_bytes import PAGE, RULES, WINDOW, Held, Kept, n_pages, static
from kvtool.core.plan.layers import Layer, Shapes
from kvtool.registry import IMPLEMENTATIONS, split_kind

KVTOOL, TRANSFORMERS = IMPLEMENTATIONS
LOSSLESS = ("dynamic", "static", "paged")
POINTER = 8  # bytes of a page's number in a table on the device


@dataclass(frozen=True)
class Load:
    """What is asked for: sequences side by side, tokens of each, and of the source of each."""

    rows: int
    tokens: int
    source_tokens: int = 0


@dataclass(frozen=True)
class Cache:
    """One kind of cache of one implementation, for one model. Sums are of whole numbers."""

    impl: str
    kind: str  # with settings
    shapes: Shapes
    itemsize: int

    @property
    def name(self) -> str:
        """The kind, without its settings."""
        return split_kind(self.kind)[0]

    @property
    def exact(self) -> bool:
        """Whether it loses nothing of what the model sees."""
        if self.name == "sliding":
            windows = [layer.window for layer in self.shapes.layers]
            return 0 < min(windows) <= max(windows) <= self.settings.get("window", WINDOW)
        return self.name in LOSSLESS

    @property
    def settings(self) -> Mapping[str, int]:
        """What is said of it."""
        return split_kind(self.kind)[1]

    def held(self, load: Load) -> Held:
        """Bytes of keys and values of all layers and rows, those of the source too."""
        allocated = live = 0
        for layer, times in Counter(self.shapes.layers).items():
            one = self._of_layer(layer, load)
            allocated, live = allocated + times * one.allocated, live + times * one.live
        source = self.source_nbytes(load)
        return Held(allocated + source, live + source)

    def peak(self, load: Load) -> int:
        """Bytes right after a prompt of all tokens, before the next step.

        Of a layer with a window, transformers' dynamic cache keeps a slice of the whole prompt's
        keys and values until then, and so the memory of all of it.
        """
        if (self.impl, self.name) != (TRANSFORMERS, "dynamic"):
            return self.held(load).allocated
        full = replace(self.shapes, layers=tuple(replace(x, window=0) for x in self.shapes.layers))
        return replace(self, shapes=full).held(load).allocated

    def source_nbytes(self, load: Load) -> int:
        """Bytes of the source's keys and values, which every kind keeps as they are."""
        if self.name == "none":
            return 0
        return sum(load.rows * load.source_tokens * self._kept(x).token for x in self.shapes.cross)

    def _of_layer(self, layer: Layer, load: Load) -> Held:
        kept, n = self._kept(layer), load.tokens
        if self.impl == KVTOOL:  # which keeps what its kind keeps, whatever a layer sees
            return RULES[self.name](kept, load.rows, n, n, n, **self.settings)
        # Of a layer with a window, transformers keeps that, and the token that leaves it.
        return static(kept, load.rows, *[min(n, layer.window) if layer.window else n] * 2)

    def _kept(self, layer: Layer) -> Kept:
        return Kept(layer.n_heads, layer.key_dim, layer.value_dim, self.itemsize)

    def token_nbytes(self, load: Load) -> int:
        """Bytes of each further token of a row, over many, where all windows are full."""
        many, step = 2**22, 2**16
        one = replace(load, rows=1)
        more, before = (self.held(replace(one, tokens=n)).allocated for n in (many + step, many))
        return (more - before) // step

    def pages(self, load: Load) -> dict[str, int]:
        """Of a paged cache: its pages, bytes of the table, and of what the last pages waste."""
        if self.name != "paged":
            return {}
        page = self.settings.get("page", PAGE)
        n = load.rows * n_pages(load.tokens, page)
        held = self.held(load)
        return {
            "pages": n,
            "table_bytes": POINTER * n,
            "waste_bytes": held.allocated - held.live,
        }

    def most_rows(self, load: Load, room: int) -> int:
        """How many rows of so many tokens fit into `room` bytes at most."""
        one = self.peak(replace(load, rows=1))
        return min(max(room, 0) // one, LARGEST_SIZE) if one else LARGEST_SIZE

    def most_tokens(self, load: Load, room: int) -> int:
        """How many tokens of so many rows fit into `room` bytes at most."""
        low, high = 0, LARGEST_SIZE
        while low < high:
            middle = (low + high + 1) // 2
            if self.peak(replace(load, tokens=middle)) <= room:
                low = middle
            else:
                high = middle - 1
        return low


def kinds_of(shapes: Shapes) -> list[str]:
    """The kinds that suit a model: one that forgets only if every layer has a window."""
    windows = {layer.window for layer in shapes.layers}
    found = [kind for kind in RULES if kind not in ("none", "sliding")]
    if 0 not in windows:
        found.insert(found.index("static") + 1, f"sliding:window={max(windows)}")
    return found
