"""The first layers of a model that is too large as a whole: which tensors of a folder they need."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kvtool.errors import UsageError

LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")  # as kvtool, Llama and GPT-2 name them
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


class FirstLayers:
    """Which tensors the first `n` layers need, by their names; all that are of no layer are."""

    def __init__(self, n: int) -> None:
        self.n = n

    def needs(self, name: str) -> bool:
        """Whether a tensor is read.

        >>> FirstLayers(2).needs("model.layers.1.mlp.up_proj.weight")
        True
        >>> FirstLayers(2).needs("model.layers.2.mlp.up_proj.weight")
        False
        """
        found = LAYER.search(name)
        return found is None or int(found[1]) < self.n

    def cuts(self, described: Mapping[str, Any]) -> bool:
        """Whether a config.json describes more layers. Raises UsageError if it describes fewer.

        >>> FirstLayers(1).cuts({"n_layer": 2}), FirstLayers(2).cuts({"n_layer": 2})
        (True, False)
        """
        counts = _counts(described)
        if counts and self.n > max(counts):
            raise UsageError(
                f"--layers {self.n}: the model has {max(counts)}", "Leave it out to judge all."
            )
        return not counts or self.n < max(counts)

    def settings(self, described: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json of Hugging Face that describes those layers alone.

        >>> FirstLayers(1).settings({"n_layer": 2, "layer_types": ["a", "b"]})
        {'n_layer': 1, 'layer_types': ['a']}
        """
        counts = _counts(described)
        if not counts or self.n >= max(counts):
            return dict(described)

        def fewer(name: str, value: Any) -> Any:
            if name in COUNTS and isinstance(value, int):
                return min(value, self.n)
            of_layers = isinstance(value, list) and len(value) == max(counts)
            return value[: self.n] if of_layers else value

        return {name: fewer(name, value) for name, value in described.items()}


def _counts(described: Mapping[str, Any]) -> list[int]:
    return [described[name] for name in COUNTS if isinstance(described.get(name), int)]
