"""Folders of transformers: it is given what kvtool read, and opens nothing of them itself."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from cli_probe import Ran, refused
from kvtool.core import limited
from kvtool.core.verify.hf import folder as hub_folder
from kvtool.core.verify.hf.folder import read_folder
from kvtool.core.verify.hf.library import SEQ2SEQ, kind_of, quiet_transformers
from kvtool.core.verify.hf.tiny import tiny_model
from kvtool.errors import CheckFailed, FileError
from kvtool.reading import MAX_CONFIG_BYTES

transformers = pytest.importorskip("transformers")

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"
# Of all ways to keep a state, to share weights, to store experts, and to name things.
TYPES = (
    "llama", "gpt2", "mistral", "mixtral", "qwen3", "gemma3", "gpt_neox", "falcon", "bloom", "opt",
    "mamba", "mamba2", "rwkv", "xlnet", "zamba2", "deepseek_v3", "bart", "t5", "marian",
)  # fmt: skip


def save(model_type: str, folder: Path, **options: Any) -> Path:
    model = tiny_model(model_type, kind=kind_of(model_type)).model
    with quiet_transformers():
        model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("hub") / "saved")


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A Llama that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    change(weights)
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(weights, {"format": "pt"}))


def refusal(folder: Path, kind: type[Exception] = FileError) -> str:
    with pytest.raises(kind) as caught:
        read_folder(folder, kind=CheckFailed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what transformers saved is read as transformers reads it


@pytest.mark.parametrize("model_type", TYPES)
def test_a_saved_model_is_read_as_transformers_reads_it(model_type: str, tmp_path: Path) -> None:
    folder = save(model_type, tmp_path)
    kind = "Seq2SeqLM" if kind_of(model_type) == SEQ2SEQ else "CausalLM"
    with quiet_transformers():
        theirs = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder)
    for form in ("one file", "pickled"):
        if form == "pickled":
            torch.save(safetensors.torch.load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
            (folder / WEIGHTS).unlink()
        ours = read_folder(folder).model
        assert type(ours) is type(theirs) and ours.dtype == theirs.dtype and not ours.training
        found, expected = ours.state_dict(), theirs.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        tables = dict(theirs.named_buffers())  # of which no file has any
        assert all(torch.equal(table, tables[name]) for name, table in ours.named_buffers())


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "bart"])
def test_shards_are_read_like_one_file(model_type: str, tmp_path: Path) -> None:
    one, more = save(model_type, tmp_path / "one"), tmp_path / "more"
    save(model_type, more, max_shard_size="100KB")
    assert len(list(more.glob("*.safetensors"))) > 2
    expected = read_folder(one).model.state_dict()
    found = read_folder(more).model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_links_of_hugging_faces_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert read_folder(folder).model.config.model_type == "llama"


class Opened:
    """The files that Python opens below a folder."""

    def __init__(self) -> None:
        self.below = ""
        self.names: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.below and event == "open" and str(args[0]).startswith(self.below):
            self.names.append(os.path.basename(str(args[0])))


@pytest.fixture(scope="module")
def opened() -> Opened:
    return Opened()  # a hook is never taken away


@pytest.fixture
def watched(opened: Opened, folder: Path) -> Iterator[list[str]]:
    opened.names = []
    opened.below = str(folder)
    yield opened.names
    opened.below = ""


def test_nothing_but_the_configuration_and_the_weights_is_opened(
    watched: list[str], folder: Path
) -> None:
    for name in ("generation_config.json", "tokenizer_config.json", "custom_generate", "x.py"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)  # whoever opens it waits for ever
    change(folder, auto_map={"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"})
    del watched[:]
    read_folder(folder)
    assert set(watched) == {"config.json", WEIGHTS}


# --- tensors


def test_missing_extra_and_misshapen_tensors_are_refused(
    folder: Path, llama: Path, tmp_path: Path
) -> None:
    n = len(safetensors.torch.load_file(llama / WEIGHTS))
    change_weights(folder, lambda weights: weights.pop(Q))
    assert refusal(folder) == f"{folder / WEIGHTS}: lacks 1 of {n} tensors ({Q})"
    both = {Q: torch.zeros(64, 64), "more": torch.zeros(1)}
    change_weights(folder, lambda weights: weights.update(both))
    held = "holds 1 tensors that the model of config.json does not have (more)"
    assert refusal(folder) == f"{folder / WEIGHTS}: {held}"
    change_weights(folder, lambda weights: weights.update({Q: weights.pop("more")}))
    assert f"{WEIGHTS}: {Q} has shape [1] (expected [64, 64])" in refusal(folder)


def test_other_names_for_all_tensors_are_refused_and_ten_of_them_told(folder: Path) -> None:
    def rename(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[f"x.{name}"] = weights.pop(name)

    change_weights(folder, rename)
    message = refusal(folder)
    assert re.search(r"lacks (\d+) of \1 tensors \((\S+, ){10}\.\.\.\)", message)
    assert "It holds others instead: x.lm_head.weight, " in message


def test_nothing_is_drawn_for_what_a_tied_head_lacks(tmp_path: Path) -> None:
    folder = save("gpt2", tmp_path)  # its head shares the embedding's weights
    change_weights(folder, lambda weights: weights.pop("transformer.wte.weight"))
    assert "lacks" in refusal(folder)
    save("gpt2", tmp_path)
    change(folder, tie_word_embeddings=False)
    assert re.search(r"lacks 1 of \d+ tensors \(lm_head.weight\)", refusal(folder))


def test_a_tensor_under_two_names_is_refused(folder: Path) -> None:
    def again(weights: dict[str, torch.Tensor]) -> None:
        weights["norm.weight"] = weights["model.norm.weight"] + 1

    change_weights(folder, again)
    assert "holds 1 tensors that the model of config.json does not have (norm.weight)" in refusal(
        folder
    )


def test_tensors_that_are_tied_may_not_differ(folder: Path) -> None:
    change(folder, tie_word_embeddings=True)
    message = refusal(folder)
    assert "lm_head.weight differs from model.embed_tokens.weight (expected the same" in message
    copied = safetensors.torch.load_file(folder / WEIGHTS)["model.embed_tokens.weight"].clone()
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": copied}))
    assert read_folder(folder).model.config.tie_word_embeddings


def test_whole_numbers_in_place_of_weights_are_refused(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({Q: weights[Q].long()}))
    assert f"{Q} has dtype int64 (expected one of F32, F16, BF16, F64)" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_a_no(
    value: float, folder: Path, kv: Callable[..., Ran]
) -> None:
    change_weights(folder, lambda weights: weights[Q].view(-1)[3:5].fill_(value))
    words = f"--impl transformers --model {folder} --caches dynamic --tokens 4"
    ran = kv(*words.split(), command="verify-cache")
    assert ran.code == 1
    assert f"{WEIGHTS}: {Q} holds 2 NaN or infinite values" in ran.err


@pytest.mark.parametrize("place", ["/etc/passwd", "../x", "a/b"])
def test_shards_lie_beside_their_index(place: str, folder: Path) -> None:
    names = safetensors.torch.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder.parent / "x")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, place)}))
    assert f"{INDEX}: places" in refusal(folder)


# --- configurations


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported"),
        ({"transformers_weights": "../x.safetensors"}, "transformers_weights is not supported"),
        (
            {"_attn_implementation": "org/kernel"},
            "_attn_implementation is 'org/kernel'",
        ),
        ({"attn_implementation": {"text_config": "org/k:f"}}, "attn_implementation is 'org/k:f'"),
        ({"text_config": {"experts_implementation": "a/b@c"}}, "experts_implementation is 'a/b@c'"),
        ({"dtype": "load"}, "dtype is 'load' (expected one of float32, "),
        ({"torch_dtype": ["float32"]}, "torch_dtype is ['float32']"),
        ({"model_type": "no_such"}, "model_type 'no_such' is none that transformers knows"),
        ({"model_type": ["llama"]}, "model_type is missing or not a string"),
        ({"model_type": None}, "model_type is missing or not a string"),
        ({"model_type": "vit"}, "model_type vit has no model that writes text"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, but model.safetensors holds"),
        ({"num_hidden_layers": 900}, "describes a larger model than model.safetensors holds"),
        ({"num_labels": 10**8}, "num_labels is 100000000 (expected 100,000 or fewer)"),
        ({"vocab_size": 10**9}, "describes a larger model than model.safetensors holds"),
    ],
)
def test_a_configuration_that_asks_for_more_than_its_weights_is_refused(
    fields: dict[str, Any], message: str, folder: Path
) -> None:
    change(folder, **fields)
    found = refusal(folder)
    assert found.startswith(f"{folder / 'config.json'}: ") and message in found


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": "many"}, {"hidden_size": -1}, {"num_attention_heads": 0},
        {"head_dim": 2**62}, {"rope_parameters": 5}, {"hidden_act": "none"}, {"architectures": 5},
        {"layer_types": [3]},
        {"dtype": {"": "float32"}}, {"rope_theta": []},
    ],
)  # fmt: skip
def test_whatever_transformers_says_of_a_configuration_is_one_line(
    fields: dict[str, Any], folder: Path
) -> None:
    change(folder, **fields)
    try:
        read_folder(folder)
    except FileError as error:
        assert str(folder) in str(error) and "\n" not in str(error) and len(str(error)) < 500


@pytest.mark.parametrize(
    "text",
    [
        '{"model_type": "llama", "model_type": "gpt2"}',
        '{"model_type": "llama", "x": ' + 900 * "[" + 900 * "]" + "}",
        '{"model_type": "llama", "hidden_size": ' + 5000 * "9" + "}",
        "[]",
    ],
)
def test_json_that_says_two_things_or_breaks_its_reader_is_refused(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    assert f"{folder / 'config.json'}: " in refusal(folder)


def test_files_that_are_none_are_refused_and_not_waited_for(folder: Path) -> None:
    for name in ("config.json", WEIGHTS):
        (folder / name).rename(folder / "kept")
        os.mkfifo(folder / name)
        assert f"{name}: is not a regular file" in refusal(folder)
        (folder / name).unlink()
        (folder / name).mkdir()
        assert f"{name}: is a folder" in refusal(folder)
        (folder / name).rmdir()
        (folder / "kept").rename(folder / name)
    with open(folder / "config.json", "ab") as file:
        file.truncate(MAX_CONFIG_BYTES + 1)
    assert "config.json: is too large for a configuration" in refusal(folder)


def test_an_adapter_is_no_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/"}')
    assert "adapter_config.json: is of an adapter (expected a whole model)" in refusal(folder)


def test_tables_that_no_file_holds_are_bounded(tmp_path: Path) -> None:
    folder = save("gptj", tmp_path)
    change(folder, n_positions=10**8)
    assert "config.json: what it describes takes 2.98 GiB of tables" in refusal(folder)


# --- limits


def test_work_beyond_its_time_or_memory_is_one_line() -> None:
    slow = pytest.raises(FileError, match=r"x takes more than 0\.05 s to build")
    with slow, limited.limited("x", seconds=0.05):
        while True:
            with contextlib.suppress(Exception):  # as libraries do
                sum(range(1000))
    large = pytest.raises(FileError, match=r"x takes more than 0\.25 GiB beside its weights")
    with large, limited.limited("x", nbytes=2**28):
        bytearray(2**30)
    bytearray(2**29)  # what was set is as it was


@pytest.mark.parametrize("what", ["make_config", "_load"])
def test_a_configuration_that_is_built_for_ever_ends(
    what: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forever(*given: Any) -> None:
        while True:
            pass

    monkeypatch.setattr(hub_folder, what, forever)
    monkeypatch.setattr(hub_folder, "limited", partial(limited.limited, seconds=0.05))
    assert "config.json: what it describes takes more than 0.05 s to build" in refusal(folder)


# --- every way in


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("verify-cache", "--impl transformers --tokens 4"),
        ("verify-cache", "--tokens 4"),
        ("verify-logits", "--against transformers"),
        ("generate", "--prompt 1 --max-tokens 2"),
        ("bench", "--impl kvtool transformers --lengths 4 --repeats 1"),
    ],
)
def test_each_command_refuses_what_lacks_a_tensor(
    command: str, words: str, folder: Path, kv: Callable[..., Ran]
) -> None:
    change_weights(folder, lambda weights: weights.pop(Q))
    message = refused(kv("--model", str(folder), *words.split(), command=command))
    assert message.startswith(f"{folder / WEIGHTS}: lacks 1 of ") and message.endswith(f"({Q})")
