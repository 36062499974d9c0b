"""The codes of a quantized cache, packed into bytes, with their scales and zero points."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor

from kvtool.core.cache.direct_access import is_readable
from kvtool.core.native import coded as native
from kvtool.core.native.coded import Coded


class Packed:
    """The quantized keys or values of a layer: codes of `bits` bits, scales and zero points.

    They stand for (rows,Hkv,columns,D). Along dimension `dim`, 2 (tokens) or 3 (channels), `size`
    entries share a scale and a zero point. With 4 bits, two consecutive tokens share a byte.
    """

    def __init__(self, like: Tensor, columns: int, bits: int, dim: int, size: int) -> None:
        """Room for `columns` tokens, whole groups, with the layout of `like` (rows,Hkv,1,D)."""
        self.bits, self.dim, self.size = bits, dim, size
        self.per_byte = 8 // bits
        rows, heads, _, width = like.shape
        codes = (rows, heads, columns // self.per_byte, width)
        self.codes = like.new_zeros(codes, dtype=torch.uint8)
        shape = [rows, heads, columns, width]
        shape[dim : dim + 1] = [shape[dim] // size, 1]
        self.scale, self.zero_point = like.new_zeros(shape), like.new_zeros(shape)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and zero points."""
        return self.codes, self.scale, self.zero_point

    def write(self, start: int, x: Tensor, padding: Tensor | None = None) -> None:
        """Quantize x (rows,Hkv,n,D), whole groups, into the columns from `start` on.

        padding (rows,n) bool: tokens that the range of a group ignores.
        """
        folded = x.to(_wide(x)).unflatten(self.dim, (-1, self.size))
        low, high = self._range(folded, padding)
        levels = 2**self.bits - 1
        scale = _scale(high - low, levels, x.dtype)
        codes = ((folded - low) / scale.to(folded.dtype)).round_().clamp_(0, levels)
        codes = codes.to(torch.uint8).flatten(self.dim, self.dim + 1)
        if self.per_byte == 2:
            codes = codes[:, :, 0::2] | codes[:, :, 1::2] << 4
        _put(self.codes, start // self.per_byte, codes)
        first = start // self.size if self.dim == 2 else start
        _put(self.scale, first, scale)
        _put(self.zero_point, first, low.to(x.dtype))

    def _range(self, folded: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """The minimum and maximum of the entries that share a scale."""
        if padding is None or self.dim == 3:  # scales of values belong to one token each
            return folded.aminmax(dim=self.dim + 1, keepdim=True)
        groups = padding.unflatten(1, (-1, self.size))[:, None, :, :, None]
        left_out = groups & ~groups.all(3, keepdim=True)
        low = folded.masked_fill(left_out, torch.inf).amin(3, keepdim=True)
        return low, folded.masked_fill(left_out, -torch.inf).amax(3, keepdim=True)

    def read(self, n: int) -> Tensor:
        """The first n columns, whole groups, dequantized -> (rows,Hkv,n,D) in float32 or above."""
        codes = self.codes[:, :, : n // self.per_byte]
        if self.per_byte == 2:
            codes = torch.stack([codes & 15, codes >> 4], dim=3).flatten(2, 3)
        first = slice(n // self.size if self.dim == 2 else n)
        scale, zero_point = self.scale[:, :, first], self.zero_point[:, :, first]
        wide = codes.to(_wide(scale)).unflatten(self.dim, (-1, self.size))
        return wide.mul_(scale).add_(zero_point).flatten(self.dim, self.dim + 1)

    def facts(self, like: Tensor) -> Coded | None:
        """What compiled/codes.py has to know, of no tokens as yet; None unless all is for
        (rows,Hkv,D), and of the type and where that code expects it."""
        codes, *others = self.tensors
        tokens, channels = (self.size, 1) if self.dim == 2 else (1, self.size)  # of one scale
        rows, heads, width = like.shape
        columns = codes.shape[2] * self.per_byte
        fits = codes.shape == (rows, heads, codes.shape[2], width) and codes.dtype is torch.uint8
        size = rows * heads * (columns // tokens) * (width // channels)
        alike = all(x.numel() == size and x.dtype is like.dtype for x in others)
        if type(self) is not Packed or not (fits and alike and all(map(is_readable, self.tensors))):
            return None
        at, scales, zero_points = (x.data_ptr() for x in self.tensors)
        form = (native.BYTES, native.HALF_BYTES)[self.per_byte - 1]
        return Coded(at, scales, zero_points, 0, columns, form, tokens, channels, 0)

    def gather(self, rows: Tensor) -> None:
        """Replace the tensors by copies of `rows`."""
        self.codes, self.scale, self.zero_point = (t.index_select(0, rows) for t in self.tensors)


# As DirectAccess.freeze_methods, since compiled code reads codes directly too.
packed_methods = attrgetter("write", "read", "_range")
PACKED_METHODS = packed_methods(Packed)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype to compute codes in: float32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)


def _scale(extent: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    """The scale that covers `extent` with `levels` steps, rounded up to `dtype` and never 0."""
    info = torch.finfo(dtype)
    scale = (extent / levels).to(dtype)
    larger = (scale.to(extent.dtype) * (1 + info.eps)).to(dtype)
    scale = torch.where(scale.to(extent.dtype) * levels < extent, larger, scale)
    return scale.clamp_(min=info.tiny)


def _put(goal: Tensor, start: int, new: Tensor) -> None:
    """Store new (rows,Hkv,n,...) in the columns from `start` on. Raises if one does not exist."""
    goal.narrow(2, start, new.shape[2]).copy_(new)
