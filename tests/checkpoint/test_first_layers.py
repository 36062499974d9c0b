"""The first layers of a model, judged alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from cli_probe import Ran, refused
from family_cases import CASES, build, expected, gap, save, tokens
from kvtool.core.checkpoint import checkpoint
from kvtool.core.checkpoint.safetensors_file import SafetensorsFile
from small_models import answer, save_decoder, save_seq2seq

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder in shards, of which the last is missing, and one of its first two layers alone."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sharded")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5)
    alone = tmp_path_factory.mktemp("alone")
    model.save_pretrained(folder, max_shard_size="20KB")
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(alone)
    shards = sorted(folder.glob("model-*.safetensors"))
    needed = [path for path in shards if holds_early_layers(path)]
    assert len(needed) < len(shards)
    for path in set(shards) - set(needed):
        path.unlink()
    return folder, alone


def holds_early_layers(path: Path) -> bool:
    names = SafetensorsFile(path).tensors
    return any("layers.2." not in name and "layers.3." not in name for name in names)


def test_the_first_layers_compute_what_they_do_alone_and_no_other_shard_is_needed(cut):
    folder, alone = cut
    ids = torch.arange(12)[None]
    first = checkpoint.load(str(folder), CPU, torch.float32, layers=2)
    right = checkpoint.load(str(alone), CPU, torch.float32)
    assert first.config == right.config and first.config.n_layers == 2
    with torch.inference_mode():
        assert torch.equal(first.model(ids), right.model(ids))


@pytest.mark.parametrize("impl", ["kvtool", "transformers"])
def test_the_conclusion_says_which_layers_were_judged(
    impl: str, cut: tuple[Path, Path], kv: Callable[..., Ran]
) -> None:
    args = f"--model {cut[0]} --impl {impl} --layers 2 --caches dynamic --scenarios decode"
    ran = kv(*args.split(), "--tokens", "4", "--threads", "1", command="verify-cache")
    assert ran.code == 0 and "judged: the first 2 layers alone" in " ".join(ran.out.split())
    assert "later layers are not read or judged" in " ".join(ran.err.split())
    document = answer(kv(*args.split(), "--tokens", "4", "--json", command="verify-cache"))
    assert document["resolved"]["layers"] == 2


def test_as_many_layers_as_there_are_are_the_whole_model(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path)
    for layers in (0, 2):
        found = checkpoint.load(str(folder), CPU, torch.float32, layers=layers)
        assert found.config.n_layers == 2


def test_what_has_no_first_layers_of_its_own_is_refused(
    tmp_path: Path, kv: Callable[..., Ran]
) -> None:
    folder = save_seq2seq(tmp_path, n_layers=3)
    ran = kv("--model", str(folder), *["--layers", "1", "--tokens", "8"], command="verify-cache")
    assert ran.code == 2 and "encoder-decoder" in ran.err
    of_a_type = ["--model", "llama", "--impl", "transformers", "--layers", "1"]
    assert "--layers" in refused(kv(*of_a_type, command="verify-cache"))


@pytest.mark.parametrize(
    "name", ["gemma2", "gemma3", "smollm3", "smollm3, window", "qwen2, window in later layers"]
)
def test_layers_of_several_kinds_are_cut_with_what_is_said_of_each(
    name: str, tmp_path: Path
) -> None:
    model, ids = build(CASES[name]), tokens()
    save(model, tmp_path)
    for n in range(len(model.model.layers) - 1, 0, -1):
        model.model.layers = model.model.layers[:n]
        model.config.num_hidden_layers = n
        first = checkpoint.load(str(tmp_path), CPU, torch.float64, layers=n)
        with torch.inference_mode():
            assert gap(first.model(ids), expected(model, ids)) < 1e-12


@pytest.mark.parametrize("impl", ["kvtool", "transformers"])
def test_as_many_layers_as_there_are_is_the_whole_model_and_more_are_refused(
    impl: str, cut: tuple[Path, Path], kv: Callable[..., Ran]
) -> None:
    args = f"--model {cut[1]} --impl {impl} --caches dynamic --scenarios crop --threads 1".split()
    ran = kv(*args, "--layers", "2", command="verify-cache")
    assert ran.code == 0 and "judged:" not in ran.out and "--layers" not in ran.err
    for n, message in (("0", "0 is too small (expected 1 or more)"), ("3", "the model has 2")):
        ran = kv(*args, "--layers", n, command="verify-cache")
        assert (
            ran.code == 2 and ran.err.startswith("kvtool: error: --layers") and message in ran.err
        )


@pytest.mark.parametrize(("impl", "least"), [("kvtool", 12), ("transformers", 24)])
def test_what_is_fed_by_default_fits_a_short_context(
    impl: str, least: int, kv: Callable[..., Ran], tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(**{**SIZES, "max_position_embeddings": 32})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    args = f"--model {tmp_path} --impl {impl} --caches dynamic --scenarios decode crop".split()
    ran = kv(*args, "--threads", "1", command="verify-cache")
    assert ran.code == 0 and "--tokens 128: 2" in ran.err and "the model holds 32" in ran.err
    config.max_position_embeddings = least - 1
    config.save_pretrained(tmp_path)
    ran = kv(*args, command="verify-cache")
    assert ran.code == 2 and f"holds {least - 1} tokens (expected {least} or more)" in ran.err
