"""kvtool plan, as a user meets it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cli_probe import Ran, refused
from kvtool.commands.plan.sizes import read_size
from kvtool.core.plan.architectures import FIELDS, architectures
from kvtool.core.plan.layers import MAX_LAYERS
from kvtool.core.plan.source import describe
from kvtool.errors import KvtoolError, UsageError
from kvtool.ui.documents import SUFFIXES
from small_models import answer, explains_every_option, save_decoder

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 1000,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}  # fmt: skip
TOKEN = 4 * 2 * 2 * 8 * 2  # bytes of its keys and values in bfloat16


@pytest.fixture
def plan(kv: Callable[..., Ran]) -> Callable[..., Ran]:
    return lambda *words: kv(*words, command="plan")


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**LLAMA, **changes}))
        return str(path)

    return write


def test_the_document_has_all_bytes_as_whole_numbers(
    plan: Callable[..., Ran], config: Callable[..., str]
) -> None:
    words = ["--tokens", "100", "--batch-size", "3", "--memory", "10MB", "--bandwidth", "1GB/s"]
    found = answer(plan("--model", config(), *words, "--json"))
    assert found["schema"] == "kvtool.plan/1"
    assert (found["rows_planned"], found["tokens"], found["context"]) == (3, 100, 4096)
    rows = {(row["impl"], row["cache"]): row for row in found["caches"]}
    assert {type(v) for row in rows.values() for k, v in row.items() if "bytes" in k} <= {
        int,
        type(None),
    }
    row = rows["kvtool", "static"]
    assert row["bytes"] == 300 * TOKEN and row["bytes_per_token"] == TOKEN
    room = 10**7 - found["weights_bytes"]
    assert row["most_rows"] == room // (100 * TOKEN)
    assert row["most_tokens"] == room // (3 * TOKEN)
    assert row["floor_s"] == (found["weights_read_bytes"] + row["bytes"]) / 10**9
    assert found["settings"]["memory"] == 10**7
    assert ("kvtool", "sliding") not in rows and ("transformers", "static") in rows


def test_what_is_said_to_fit_fits_and_one_more_does_not(
    plan: Callable[..., Ran], config: Callable[..., str]
) -> None:
    path = config()
    words = ("--model", path, "--tokens", "90", "--memory", "1MB", "--json")
    for row in answer(plan(*words))["caches"]:
        kind = ("--caches", row["cache"], "--impl", row["impl"])
        for option, most in (("--batch-size", "most_rows"), ("--tokens", "most_tokens")):
            for n, code in ((row[most], 0), (row[most] + 1, 1)):
                assert plan(*words, *kind, option, str(n)).code == code, (row["cache"], option, n)


def test_the_last_line_recommends_and_names_the_first_limit(
    plan: Callable[..., Ran], config: Callable[..., str]
) -> None:
    path = config()
    assert plan("--model", path, "--tokens", "100", "--memory", "1MB").out.splitlines()[-1] == (
        "✓ take dynamic: 1 row of 100 tokens fits into 977 KiB; the first limit: it holds "
        "18 rows of 100 tokens or 1,813 tokens in one at most"
    )
    small = plan("--model", path, "--tokens", "2500", "--memory", "1MB")
    assert small.code == 0 and "take fp8: " in small.out
    assert "with no kind that loses less" in small.out
    assert "or the model's 4,096 tokens in one at most" in plan(
        "--model", path, "--memory", "1GB"
    ).out.replace("\n", " ")
    none = plan("--model", path, "--tokens", "4096", "--batch-size", "9", "--memory", "1MB")
    assert none.code == 1
    assert "no cache of 9 rows of 4,096 tokens fits into 977 KiB" in none.out
    assert "but the model is made for 4,096 tokens" in plan("--model", path, "--tokens", "5000").out


def test_the_last_line_says_nothing_of_kinds_that_were_not_asked_for(
    plan: Callable[..., Ran], config: Callable[..., str]
) -> None:
    words = ("--model", config(), "--memory", "1GB", "--tokens", "9")
    assert "loses less" not in plan(*words, "--caches", "int4").out
    none = plan(*words, "--caches", "none").out
    assert "loses less" not in none and "it holds any rows of 9 tokens" in none
    words = ("--model", config(), "--tokens", "5000", "--batch-size", "999", "--memory", "1MB")
    assert "but the model is made for 4,096 tokens" in plan(*words).out


MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    "changes",
    [
        MIXTRAL,
        {**MIXTRAL, "quantization_config": {"quant_method": "awq"}},
        {**MIXTRAL, "model_type": "some_vlm", "text_config": {**LLAMA, **MIXTRAL}},
    ],
)
def test_of_weights_as_given_a_token_reads_the_same_share(
    plan: Callable[..., Ran], config: Callable[..., str], changes: dict[str, Any]
) -> None:
    counted = answer(plan("--model", config(**MIXTRAL), "--json"))
    whole, read = counted["weights_bytes"], counted["weights_read_bytes"]
    given = answer(plan("--model", config(**changes), "--weights", str(whole // 4), "--json"))
    assert read < whole / 2 and given["weights_bytes"] == whole // 4
    assert given["weights_read_bytes"] == pytest.approx(read / 4, abs=2)


def test_of_a_folder_s_experts_those_of_one_token_are_read_wherever_their_number_stands(
    plan: Callable[..., Ran], tmp_path: Path
) -> None:
    text = {**LLAMA, **MIXTRAL}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vlm", "text_config": text}))
    save_file({"model.experts.w": torch.zeros(8, 100)}, tmp_path / "model.safetensors")
    found = answer(plan("--model", str(tmp_path), "--json"))
    assert (found["weights_bytes"], found["weights_read_bytes"]) == (3200, 800)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads: 0 is too small (expected 1 or more)"),
        ({"num_attention_heads": "8"}, "num_attention_heads: '8' is not a whole number"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: -1 is too small"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers: 2147483648 is too large"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: 1000000 is too large"),
        ({"hidden_size": 2**62}, "hidden_size: 4611686018427387904 is too large"),
        ({"hidden_size": 63}, "num_attention_heads: 8 heads do not divide hidden_size 63"),
        ({"num_key_value_heads": 3}, "3 key-value heads do not divide 8 heads"),
        ({"head_dim": 1.5}, "head_dim: 1.5 is not a whole number"),
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": 7}, "model_type 7 is not a name"),
        ({"model_type": "lama"}, "model_type 'lama' is not known, so nothing is planned"),
        ({"model_type": "mamba"}, "cannot be planned: its layers keep a state"),
        ({"model_type": "openai-gpt"}, "it keeps no keys and values from token to token"),
        ({"model_type": "deepseek_v32"}, "its layers keep an indexer's keys"),
        ({"layer_types": ["full_attention"]}, "layer_types: expected a list of 4"),
        ({"layer_types": ["linear_attention"] * 4}, "'linear_attention' layers keep other things"),
        ({"layer_types": [None] * 4}, "layer_types: None layers keep other things"),
        ({"torch_dtype": ["float32"]}, "torch_dtype: ['float32'] is not a format of keys"),
        ({"dtype": "int8"}, "dtype: 'int8' is not a format of keys and values (expected float64"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"per_layer_config": [1]}, "per_layer_config: [1] is not an object"),
        ({"model_type": "qwen3_moe", "use_sliding_window": "no"}, "'no' is not true or false"),
        ({"model_type": "gemma3"}, "text_config is missing (found num_hidden_layers beside it)"),
        ({"layer_types": ["sliding_attention"] * 4}, "but sliding_window is not set"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok: 9 of 8"),
        ({"model_type": "gemma3", "text_config": []}, "text_config: [] is not an object"),
    ],
)
def test_a_configuration_that_is_wrong_is_refused_in_one_line(
    plan: Callable[..., Ran], config: Callable[..., str], changes: dict[str, Any], said: str
) -> None:
    ran = plan("--model", config(**changes))
    assert said in refused(ran)


def test_the_report_is_written_in_every_format_of_the_help(
    plan: Callable[..., Ran], config: Callable[..., str], tmp_path: Path
) -> None:
    for suffix in SUFFIXES:
        out = tmp_path / f"r{suffix}"
        ran = plan("--model", config(), "--tokens", "99", "--output", str(out))
        assert ran.code == 0 and f"written to {out}" in ran.err, ran.err
    assert "dtype bfloat16, rows 1, tokens 99" in (tmp_path / "r.md").read_text()
    assert "static,kvtool" in (tmp_path / "r.csv").read_text()


def test_the_number_format_is_that_of_the_file_or_said_to_be_assumed(
    plan: Callable[..., Ran], config: Callable[..., str]
) -> None:
    part = {"model_type": "gemma3_text", "dtype": "float32"}
    for changes, said in (
        ({}, "bfloat16 assumed"),
        ({"dtype": "torch.float16"}, "float16"),
        ({"text_config": part, "model_type": "gemma3"}, "float32"),
    ):
        first = plan("--model", config(**changes)).out.partition("\nweights")[0]
        assert first.replace("\n", " ").endswith(f"; {said}")


def test_the_language_model_of_an_unknown_type_is_planned_if_its_own_type_is_known(
    plan: Callable[..., Ran], config: Callable[..., str]
) -> None:
    words = ("--tokens", "100", "--json")
    whole = answer(plan("--model", config(model_type="llava", text_config=LLAMA), *words))
    alone = answer(plan("--model", config(), *words))
    assert whole["caches"] == alone["caches"] and whole["model_type"] == "llava"
    assert whole["weights_said_by"] == "configuration of the language model"
    for of, said in (("bert", "'blip' is not known"), ("mamba", "cannot be planned")):
        path = config(model_type="blip", text_config={"model_type": of})
        assert said in refused(plan("--model", path))


@pytest.mark.parametrize("model_type", ["gemma4_text", "qwen2_moe", "hrm_text", "prophetnet"])
def test_a_field_of_another_type_or_size_is_planned_or_refused_in_one_line(
    tmp_path: Path, model_type: str
) -> None:
    path = tmp_path / "config.json"
    known = architectures()[model_type]
    fields = {*FIELDS, *known.names.values(), "layer_types", "dtype", "per_layer_config"}
    for field, value in itertools.product(
        sorted(fields), (None, "x", [], {}, -1, 1.5, True, 10**30, [None], {"a": 1})
    ):
        path.write_text(json.dumps({"model_type": model_type, field: value}))
        try:
            assert len(describe(str(path), None).shapes.layers) <= MAX_LAYERS
        except KvtoolError as error:
            assert "\n" not in error.message


def test_files_that_describe_no_language_model_are_refused(
    plan: Callable[..., Ran], tmp_path: Path
) -> None:
    assert "holds no config.json" in refused(plan("--model", str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    assert "config.json: is not valid JSON" in refused(plan("--model", str(tmp_path)))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert "a diffusion model ('UNet2DConditionModel')" in refused(plan("--model", str(tmp_path)))
    (tmp_path / "model_index.json").write_text("{}")
    assert "is a pipeline of diffusers" in refused(plan("--model", str(tmp_path)))


def test_options_that_cannot_be_meant_are_refused(
    plan: Callable[..., Ran], config: Callable[..., str]
) -> None:
    path = config()
    for words, said in (
        (("--tokens", "0"), "--tokens: 0 is too small"),
        (("--tokens", "9999999999"), "--tokens: 9999999999 is too large"),
        (("--batch-size", "-2"), "--batch-size: -2 is too small"),
        (("--memory", "24g"), "'g' is not a unit"),
        (("--bandwidth", "300GBps"), "Did you mean 300GB/s?"),
        (("--caches", "paged", "--impl", "transformers"), "paged is no kind of transformers"),
        (("--caches", "nonsense", "--impl", "transformers"), "transformers: dynamic and static."),
        (("--source-tokens", "9"), "--source-tokens: is for encoder-decoders"),
        (("--dtype", "int8"), "--dtype: 'int8' is not known"),
        (("--window", "9", "--caches", "static"), "--window: no setting of static"),
    ):
        assert said in refused(plan("--model", path, *words)), words
    for name in ("lama", "LLAMA"):
        assert "Did you mean llama?" in refused(plan("--model", name))
    for name in ("llava", "mistral3", "qwen2_vl", "idefics3"):
        said = refused(plan("--model", name))
        assert "whose text_config says" in said and "Did you mean" not in said
    said = refused(plan("--model", "nofolder"))
    assert "not found (it is neither a folder" in said and "Did you mean" not in said
    asked = refused(plan("--model", "dbrx", "--memory", "80GB"))
    assert "--memory: needs the size of the weights" in asked and "--weights SIZE" in asked
    assert plan("--model", "dbrx", "--memory", "80GB", "--weights", "6GB").code == 0


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("1.5 kib", 1536),
        ("77", 77),
        ("2TB", 2**1 * 10**12),
    ],
)
def test_sizes_are_read_exactly(text: str, nbytes: int) -> None:
    assert read_size("--memory", text) == nbytes
    assert read_size("--bandwidth", f"{text.replace(' ', '')}/s", per_second=True) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GB", "24g", "24GIBI", "0", "1e3GB", "nan", "9" * 30, "24Gb"]
)
def test_other_spellings_of_a_size_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--memory: "):
        read_size("--memory", text)
    with pytest.raises(UsageError, match="is not a size"):
        read_size("--memory", "3GB/s")
    with pytest.raises(UsageError, match="counts bits") as bits:
        read_size("--bandwidth", "2400Gb/s", per_second=True)
    assert bits.value.hint == "Did you mean 2400GB/s? 8 bits are a byte."
    with pytest.raises(UsageError, match="expected 1 B to 8,388,607 TiB"):
        read_size("--memory", "9999999999TB")


def test_the_configuration_that_is_read_is_not_written_over(
    plan: Callable[..., Ran], config: Callable[..., str]
) -> None:
    path = config()
    assert "is a file of --model too" in refused(plan("--model", path, "--output", path))


def test_our_own_models_are_planned_without_transformers_rows(
    plan: Callable[..., Ran], tmp_path: Path
) -> None:
    folder = save_decoder(tmp_path / "m")
    found = answer(plan("--model", str(folder), "--json"))
    assert {row["impl"] for row in found["caches"]} == {"kvtool"}
    assert found["weights_said_by"] == "headers"


def test_a_plan_loads_neither_torch_nor_transformers(config: Callable[..., str]) -> None:
    code = (
        "import sys; from kvtool.app import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), "
        "file=sys.stderr)"
    )
    words = ["plan", "--model", config(), "--memory", "1GB", "--json"]
    ran = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0 and ran.stderr.splitlines()[-1] == "[]", ran.stderr


def test_the_help_page_explains_every_option_and_breaks_no_example(
    plan: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert explains_every_option(plan("--help"), "plan")
