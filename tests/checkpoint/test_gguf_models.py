"""GGUF files as models: the logits that transformers' own reading of them gives, and what is
refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from gguf_files import CONTEXT, Made, V
from kvtool.core.checkpoint import checkpoint
from kvtool.core.checkpoint.checkpoint import Checkpoint
from kvtool.core.checkpoint.gguf import formats
from kvtool.core.models.rope_scaling import SCALE
from kvtool.core.verify.precision import Promote
from kvtool.errors import CheckFailed, FileError, KvtoolError
from kvtool.files import model_folder

CPU = torch.device("cpu")
IDS = torch.arange(1, 90)[None] * 7 % V
ROUNDING = 1e-12
FAMILIES = {
    "llama": Made(),
    "llama, tied": Made(tied=True),
    "llama, wide heads": Made(head_dim=32),
    "qwen2": Made("qwen2", seed=1),
    "qwen2, tied": Made("qwen2", tied=True),
    "qwen3": Made("qwen3", head_dim=32, seed=2),
    "gpt2": Made("gpt2", seed=3, tied=True),
    "gpt2, a head of its own": Made("gpt2"),
    "every value in BF16": Made(formats=("BF16",)),
    "ternary": Made(d_model=256, d_ff=256, head_dim=64, formats=("TQ2_0", "Q8_0", "TQ1_0")),
}
# What transformers leaves out of a GGUF header, so that its defaults would stand instead.
LEFT_OUT = {
    "qwen3": {"head_dim": 32},
    "llama, wide heads": {"head_dim": 32},
    "gpt2": {"n_inner": 96, "n_positions": CONTEXT},
    "gpt2, a head of its own": {"n_inner": 96, "n_positions": CONTEXT},
}


def load(path: Path, dtype: torch.dtype = torch.float64) -> Checkpoint:
    return checkpoint.load(str(path), CPU, dtype)


@torch.inference_mode()
def logits(path: Path, dtype: torch.dtype = torch.float64) -> Tensor:
    return load(path, dtype).model(IDS)


@torch.inference_mode()
def theirs(path: Path, **changes: Any) -> Tensor:
    """Logits of transformers' model in float64, of its own reading of the file."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    found = {**load_gguf_checkpoint(str(path))["config"], **changes}
    config = transformers.AutoConfig.for_model(**found)
    with Promote():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
        state = {name: tensor.double() for name, tensor in read["tensors"].items()}
        missing, extra = model.load_state_dict(state, strict=False)
        assert (set(missing) <= {"lm_head.weight"}, extra) == (True, [])
        model.tie_weights()
        return model(IDS, use_cache=False).logits


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers_own_reading(name: str, tmp_path: Path) -> None:
    made = FAMILIES[name]
    path = made.write(tmp_path / "a.gguf")
    assert apart(logits(path), theirs(path, **LEFT_OUT.get(name, {}))) < ROUNDING


def test_a_promoted_file_is_the_same_model(tmp_path: Path) -> None:
    from kvtool.core.checkpoint.gguf import promote
    from kvtool.core.checkpoint.gguf.header import GGUFHeader

    path = Made().write(tmp_path / "a.gguf")
    promote.write(promote.plan(GGUFHeader(path)), tmp_path / "b.gguf", lambda n, name: None)
    assert torch.equal(logits(path), logits(tmp_path / "b.gguf"))


def test_bfloat16_is_what_float32_rounds_to_and_never_both_are_held(tmp_path: Path) -> None:
    path = Made().write(tmp_path / "a.gguf")
    whole, half = (load(path, dtype).model for dtype in (torch.float32, torch.bfloat16))
    for (name, a), b in zip(whole.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b), name
    model = checkpoint.GGUFModel(path)
    assert {t.dtype for t in model.open(torch.bfloat16).tensors.values()} == {torch.bfloat16}


def test_the_digest_is_of_the_file_and_the_format_is_named(tmp_path: Path) -> None:
    path = Made(formats=("Q4_0",)).write(tmp_path / "a.gguf")
    found = load(path)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (found.stored_dtype, found.path) == ("Q4_0", path)


# --- rotary positions


def factors_of_llama3(factor: float, first: int) -> np.ndarray:
    from kvtool.config import RopeScaling

    rates = 10_000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    scaled = SCALE["llama3"](rates, 1e4, RopeScaling("llama3", factor, first, low=1.0, high=4.0))
    return (rates / scaled).float().numpy()


@pytest.mark.parametrize(("factor", "first"), [(8.0, 8192), (32.0, 8192), (4.0, CONTEXT // 4)])
def test_factors_of_llama3_are_recognised(factor: float, first: int, tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": factors_of_llama3(factor, first)}
    scaling = load(Made(tensors=tensors).write(tmp_path / "a.gguf")).config.rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor, scaling.original_context) == ("llama3", factor, first)


def test_other_factors_are_refused_with_words(tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}
    with pytest.raises(FileError, match=r"rope_freqs\.weight: holds other factors than those of"):
        load(Made(tensors=tensors).write(tmp_path / "a.gguf"))


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scalings_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    given = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0}
    rope: dict[str, Any] = {"rope_type": kind, "factor": 4.0, "rope_theta": 10_000.0}
    if kind == "yarn":
        given["llama.rope.scaling.original_context_length"] = CONTEXT // 4
        rope["original_max_position_embeddings"] = CONTEXT // 4
    path = Made(fields=given).write(tmp_path / "a.gguf")
    assert apart(logits(path), theirs(path, rope_parameters=rope)) < ROUNDING
    assert apart(logits(path), logits(Made().write(tmp_path / "b.gguf"))) > 1e-4


# --- what is refused

ODD = {
    "a field that may change it": (
        {"llama.logit_scale": 2.0},
        "llama: unknown field 'logit_scale'",
    ),
    "experts": ({"llama.expert_count": 8}, "llama: expert_count: 8 is not supported (expected 0)"),
    "longrope": ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type: 'longrope' is not"),
    "a factor for nothing": ({"llama.rope.scaling.attn_factor": 1.5}, "unknown field 'rope.sc"),
    "a window": ({"llama.attention.sliding_window": 64}, "sliding_window: 64 is not supported"),
}


@pytest.mark.parametrize("name", ODD)
def test_a_field_that_would_change_the_model_is_refused(name: str, tmp_path: Path) -> None:
    given, said = ODD[name]
    with pytest.raises(FileError) as refused:
        load(Made(fields=given).write(tmp_path / "a.gguf"))
    assert said in refused.value.message and str(tmp_path) in refused.value.message


def test_an_architecture_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"architecture 'rwkv9' is not supported \(expected one of"):
        load(Made("rwkv9").write(tmp_path / "a.gguf"))


def test_a_missing_tensor_and_a_misshapen_one_are_named_as_in_the_file(tmp_path: Path) -> None:
    more = {"blk.7.attn_q.weight": np.ones((64, 64), dtype=np.float32)}
    with pytest.raises(FileError, match=r"holds 1 tensors that the model of its header does not"):
        load(Made(tensors=more).write(tmp_path / "a.gguf"))
    odd = {"blk.1.ffn_up.weight": np.ones((64, 64), dtype=np.float32)}
    with pytest.raises(FileError, match=r"blk\.1\.ffn_up\.weight has shape \[64, 64\] \(expected"):
        load(Made(tensors=odd).write(tmp_path / "b.gguf"))


def test_nan_is_named_by_its_tensor(tmp_path: Path) -> None:
    bad = {"output_norm.weight": np.full(64, np.nan, dtype=np.float32)}
    path = Made(tensors=bad).write(tmp_path / "a.gguf")
    with pytest.raises(FileError, match=r"norm\.weight holds 64 NaN or infinite values"):
        load(path)
    with pytest.raises(CheckFailed):
        checkpoint.load(str(path), CPU, torch.float32, check=True)


def test_a_header_that_describes_billions_of_layers_builds_none(tmp_path: Path) -> None:
    path = Made(fields={}).write(tmp_path / "a.gguf")
    data = path.read_bytes()
    at = data.index(b"llama.block_count") + len("llama.block_count") + 4
    path.write_bytes(data[:at] + (2**31 - 1).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(FileError, match=r"tensors \(expected .* layers of a\.gguf\)"):
        load(path)


def test_without_the_package_gguf_it_is_asked_for_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = Made().write(tmp_path / "a.gguf")

    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="gguf")

    monkeypatch.setattr(formats.importlib, "import_module", absent)
    with pytest.raises(KvtoolError, match=r'not installed\. GGUF needs .* pip install "kvtool\[gg'):
        load(path)


# --- where it is


def test_a_folder_with_one_file_is_that_file_and_with_two_is_refused(tmp_path: Path) -> None:
    path = Made().write(tmp_path / "a.gguf")
    assert model_folder(str(tmp_path)) == path
    assert model_folder(str(path)) == path
    blob = tmp_path / "sha256-0123"
    path.rename(blob)
    assert model_folder(str(blob)) == blob  # by its first bytes
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(blob.read_bytes())
    with pytest.raises(FileError, match=r"holds 2 GGUF files \(a\.gguf, b\.gguf\)\. Name one"):
        model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert model_folder(str(tmp_path)) == tmp_path


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "model.bin"
    other.write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(FileError, match=r"is a file \(expected a checkpoint folder, or GGUF\)"):
        model_folder(str(other))
    named = tmp_path / "model.gguf"
    other.rename(named)
    with pytest.raises(FileError, match=r"is not a GGUF file \(begins with b'PK"):
        load(named)


def test_reading_by_the_package_is_what_the_test_compares_with(tmp_path: Path) -> None:
    path = Made().write(tmp_path / "a.gguf")
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert {"Q4_1", "Q8_0", "F16", "BF16", "Q4_0", "Q5_1", "F32"} == kinds
