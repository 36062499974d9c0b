"""The number formats of GGUF's tensors, and the numbers themselves.

The package `gguf` dequantises; it is an extra, and is imported when a tensor is read.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from io import BufferedReader
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtool.errors import FileError, KvtoolError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PIECE = 2**20  # values dequantised at once; gguf needs ten times their memory
EXTRA = 'GGUF needs the package gguf: pip install "kvtool[gguf]"'


class Format(NamedTuple):
    """A format: how many values a block has, and how many bytes."""

    number: int
    name: str
    block: int
    nbytes: int

    @property
    def is_whole(self) -> bool:
        """Whether its values are integers, which no weights are."""
        return self.name in ("I8", "I16", "I32", "I64")


_TABLE = """
0 F32 1 4|1 F16 1 2|2 Q4_0 32 18|3 Q4_1 32 20|6 Q5_0 32 22|7 Q5_1 32 24|8 Q8_0 32 34|9 Q8_1 32 40
10 Q2_K 256 84|11 Q3_K 256 110|12 Q4_K 256 144|13 Q5_K 256 176|14 Q6_K 256 210|15 Q8_K 256 292
16 IQ2_XXS 256 66|17 IQ2_XS 256 74|18 IQ3_XXS 256 98|19 IQ1_S 256 50|20 IQ4_NL 32 18
21 IQ3_S 256 110|22 IQ2_S 256 82|23 IQ4_XS 256 136|24 I8 1 1|25 I16 1 2|26 I32 1 4|27 I64 1 8
28 F64 1 8|29 IQ1_M 256 56|30 BF16 1 2|34 TQ1_0 256 54|35 TQ2_0 256 66|39 MXFP4 32 17
40 NVFP4 64 36|41 Q1_0 128 18
"""


def _formats() -> dict[int, Format]:
    found = {}
    for entry in _TABLE.replace("\n", "|").strip("|").split("|"):
        number, name, block, nbytes = entry.split()
        found[int(number)] = Format(int(number), name, int(block), int(nbytes))
    return found


FORMATS = _formats()


def need_gguf() -> Any:
    """The module of the package `gguf` that dequantises. Raises KvtoolError if it is missing."""
    try:
        return importlib.import_module("gguf.quants")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "gguf":
            raise
        raise KvtoolError("the package gguf is not installed", EXTRA) from error


def require_known(where: str, format_: Format) -> None:
    """Raise FileError, which begins with `where`, for a format that `gguf` cannot dequantise, and
    KvtoolError if the package is missing."""
    quants = need_gguf()
    known = {int(kind) for kind in quants._type_traits}
    if format_.name not in ("F32", "F16") and format_.number not in known:
        raise FileError(
            f"{where} is {format_.name}, which the package gguf cannot dequantise",
            "Take a file of another quantisation, or a newer gguf.",
        )


def numbers(
    file: BufferedReader, format_: Format, n_values: int, where: str
) -> Iterator[tuple[bytes, NDArray[np.float32]]]:
    """The next `n_values` of an open file in float32, in pieces, each with its bytes in the file.

    Raises FileError, which begins with `where`, if the file ends too early.
    """
    import numpy as np

    quants = need_gguf()
    size = max(PIECE // format_.block, 1) * format_.block
    for first in range(0, n_values, size):
        n = min(size, n_values - first)
        data = file.read(n // format_.block * format_.nbytes)
        if len(data) != n // format_.block * format_.nbytes:
            raise FileError(f"{where}: became shorter while it was read", "Try again.")
        # As one row: gguf takes sixteen rows at a time, and blocks do not end with rows.
        blocks = np.frombuffer(data, dtype=np.uint8)[None]
        with np.errstate(all="ignore"):  # infinite scales give NaN, which the caller looks for
            yield data, quants.dequantize(blocks, format_.number)[0]
