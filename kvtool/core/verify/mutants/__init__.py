"""Bugs that happened elsewhere, planted here, and right behaviour that looks like them."""

from __future__ import annotations

from kvtool.core.verify.mutants.batches import BATCHES
from kvtool.core.verify.mutants.contents import CONTENTS
from kvtool.core.verify.mutants.lengths import LENGTHS
from kvtool.core.verify.mutants.lookalikes import LOOKALIKES as OF_CACHES
from kvtool.core.verify.mutants.masks import MASKS
from kvtool.core.verify.mutants.mutant import BUG_CLASSES, Lookalike, Mutant, Planted
from kvtool.core.verify.mutants.pages import PAGES
from kvtool.core.verify.mutants.positions import POSITIONS
from kvtool.core.verify.mutants.quantized import QUANTIZED
from kvtool.core.verify.mutants.requests import REQUESTS
from kvtool.core.verify.mutants.right_decoders import RIGHT_DECODERS
from kvtool.core.verify.mutants.rollback import ROLLBACK
from kvtool.core.verify.mutants.slots import SLOTS
from kvtool.core.verify.mutants.sources import SOURCES
from kvtool.core.verify.mutants.windows import WINDOWS

__all__ = ["BUG_CLASSES", "LOOKALIKES", "MUTANTS", "Lookalike", "Mutant", "Planted"]

ALL = (
    *POSITIONS, *MASKS, *WINDOWS, *ROLLBACK, *SLOTS, *SOURCES, *PAGES, *QUANTIZED, *CONTENTS,
    *BATCHES, *REQUESTS, *LENGTHS,
)  # fmt: skip
LOOKALIKES: tuple[Lookalike, ...] = (*OF_CACHES, *RIGHT_DECODERS)
MUTANTS = tuple(sorted(ALL, key=lambda mutant: mutant.bug_class or 99))  # unlisted ones last
