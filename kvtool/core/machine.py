"""The device, number format and threads that a run uses, checked before any work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kvtool.config import RunConfig
from kvtool.errors import CapacityError, DeviceError

# A control group's limit, what it uses, and the page cache among that.
CGROUP_2 = "memory.max", "memory.current", "file"
CGROUP_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"
# Bytes of addresses that threads and native code take when they are first used.
RESERVED = 2**28


def prepare(config: RunConfig) -> tuple[torch.device, torch.dtype]:
    """Set threads and seed, and return where and in what format to compute. Raises DeviceError."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = choose_device(config.device)
    dtype = getattr(torch, config.dtype)
    _probe(device, dtype)
    return device, dtype


def dtype_name(dtype: torch.dtype) -> str:
    """A number format as --dtype spells it: float32."""
    return str(dtype).removeprefix("torch.")


def derived_seed(seed: int, index: int) -> int:
    """The seed of the step or epoch `index` of a run; it fits into 63 bits, as torch requires."""
    return (seed * 1_000_003 + index) % 2**63


def choose_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one. Raises DeviceError rather than take another device."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise DeviceError(
            "--device cuda: there is no CUDA device here (found cpu)",
            "Use --device cpu, or install a PyTorch build for your GPU.",
        )
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it; without them, bfloat16 only saves memory."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # since PyTorch 2.11
    return any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _probe(device: torch.device, dtype: torch.dtype) -> None:
    """Try what a model does in this format. Raises DeviceError."""
    try:
        x = torch.ones(2, 4, dtype=dtype, device=device)
        torch.nn.functional.layer_norm(x @ x.T, (2,)).softmax(-1)
        q = x.reshape(1, 1, 2, 4)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    except (RuntimeError, TypeError) as error:
        name = dtype_name(dtype)
        reason = str(error).splitlines()[0]
        raise DeviceError(
            f"--dtype {name}: {device.type} cannot compute with it ({reason})",
            "Use --dtype float32.",
        ) from error


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be had, in bytes; None if nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [_meminfo(), _own_limit(), *(_cgroup(*group) for group in _cgroups())]
    limits = [n for n in found if n is not None]
    return max(min(limits), 0) if limits else None


LESS = "Free memory, or ask for less."
LOWER = "Free memory, use a smaller --dtype, or ask for less."


def require_memory(
    what: str,
    needed: int,
    device: torch.device,
    hint: str = LESS,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise CapacityError if `needed` bytes for `what` are more than there are.

    dtype: the format that --dtype gave, where a smaller one, if there is one, would take less.
    """
    if dtype is not None and dtype.itemsize > torch.half.itemsize:
        hint = LOWER
    available = available_bytes(device)
    if available is not None and needed > available:
        raise CapacityError(
            f"{what}: needs {needed / 2**30:.3g} GiB ({available / 2**30:.3g} GiB available)",
            hint,
        )


def _meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _own_limit() -> int | None:
    """What the process may still allocate (ulimit -v)."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return None
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        return limit - pages * resource.getpagesize() - RESERVED
    except (ImportError, OSError, ValueError):  # Windows has none
        return None


def _cgroups() -> Iterator[tuple[Path, Sequence[str]]]:
    """The control groups that the process is in, from the innermost out, with the names of their
    files; a container sees its own as the root."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        lines = ["0::/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        second = not controllers
        if second or "memory" in controllers.split(","):
            top = root if second else root / "memory"
            inner = top / path.strip("/")
            for folder in (inner, *inner.parents):
                yield folder, CGROUP_2 if second else CGROUP_1
                if folder == top:
                    break


def _cgroup(folder: Path, names: Sequence[str]) -> int | None:
    """What a control group may still allocate."""
    limit_name, used_name, cached_name = names
    try:
        limit = (folder / limit_name).read_text(encoding="ascii").strip()
        used = (folder / used_name).read_text(encoding="ascii").strip()
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # The page cache counts as used, and is given back when it is needed.
        return int(limit) - int(used) + int(stat.get(cached_name, 0))  # "max" means no limit
    except (OSError, ValueError):
        return None
