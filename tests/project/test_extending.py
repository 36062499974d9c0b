"""docs/extending.md tells the truth: what it adds passes the contracts, and every command takes it.

All code is the page's own, loaded as the files that the page names.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import model_checks
from cache_contract import CHECKS
from cli_probe import Ran, refused
from helpers import CASES, PADDED, Case
from kvtool import registry
from kvtool.config import ModelConfig
from kvtool.core.cache import CacheSpec, cache_class, make_cache
from kvtool.core.checkpoint import checkpoint
from kvtool.core.decoding.dispatch import decoding_form
from kvtool.core.models import build_model, model_class
from kvtool.core.text.tokenizer import Tokenizer
from kvtool.errors import FileError, UsageError
from small_models import SIZES, TEXT, answer, random_model, save_decoder

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n# ([^\n]+)\n(.+?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
FILES = {name: code for name, code in BLOCKS if name.endswith(".py")}
LINES = [(name, code) for name, code in BLOCKS if name.startswith("kvtool/registry.py, in ")]
ADDED = "concat", "steady"


def module_name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


@pytest.fixture(scope="module", autouse=True)
def added(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The page's files and lines, as if they stood in the tree."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        for path, code in FILES.items():
            assert not (ROOT / path).exists(), path
            file = folder / Path(path).name
            file.write_text(code, encoding="utf-8")
            spec = importlib.util.spec_from_file_location(module_name(path), file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, spec.name, module)
            spec.loader.exec_module(module)
        for name, code in LINES:
            table = getattr(registry, name.rpartition(" ")[2])
            for key, value in ast.literal_eval(f"{{{code}}}").items():
                patch.setitem(table, key, value)
        yield


def test_the_page_adds_what_it_says() -> None:
    assert list(FILES) == [
        "kvtool/core/cache/concat.py",
        "kvtool/core/cache/steady.py",
        "kvtool/core/models/parallel.py",
    ]
    assert {*ADDED} < {*registry.CACHES} and "parallel" in registry.MODELS
    for link in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link


# A cache kind


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", ADDED)
def test_the_kinds_of_the_page_pass_the_contract(kind: str, case: Case) -> None:
    for check in CHECKS:
        check(cache_class(kind), case)


def test_the_first_check_of_the_page_is_needed() -> None:
    """Without the two things that it warns of, the contract is broken."""
    code = FILES["kvtool/core/cache/concat.py"]
    for right, wrong, error, said in (
        (
            "torch.cat([held[layer][:, :, : self.length], new]",
            "torch.cat([held[layer], new]",
            RuntimeError,
            "The size of tensor a",
        ),
        (
            "self.spec.batch * self.batch",
            "1",
            AssertionError,
            "live is .+, expected ",
        ),
    ):
        assert right in code
        space: dict[str, Any] = {"__name__": "broken"}
        exec(compile(code.replace(right, wrong), "broken", "exec", dont_inherit=True), space)
        with pytest.raises(error, match=said):
            for check in CHECKS:
                check(space["ConcatCache"], PADDED)


def test_the_compiled_step_serves_who_says_that_it_may() -> None:
    model = random_model(0)
    spec = CacheSpec.of(model.config, 1, 20)
    form = decoding_form(model)
    new = torch.tensor([[5]])
    with torch.no_grad():
        served = {
            kind: isinstance(form.step(new, make_cache(kind, spec), None, True), np.ndarray)
            for kind in ("dynamic", *ADDED)
        }
    assert served == {"dynamic": True, "concat": False, "steady": True}
    steady: Any = cache_class("steady")
    assert type("Derived", (steady,), {})(spec).step_addresses(1) is None


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def run(kv: Callable[..., Ran]) -> Callable[..., Ran]:
    def call(command: str, model: Path, *args: str) -> Ran:
        given = ["--model", str(model), "--threads", "1", "--device", "cpu"]
        return kv(*given, *args, command=command)

    return call


SHORT = ["--json", "--prompt", "To be", "--tokens", "4"]
KINDS_OF_THE_PAGE = [*ADDED, "steady:grain=5"]


def verdicts(document: dict[str, Any], kernels: str) -> set[str]:
    """What was found in decoding, with caches that hold everything exactly."""
    rows = [row for row in document["checks"] if row["kernels"] == kernels]
    rows = [row for row in rows if row["cache"].partition(":")[0] in ("dynamic", "static", *ADDED)]
    return {row["verdict"] for row in rows if row["scenario"] == "decode"}


def test_every_command_takes_the_kinds_of_the_page(run: Callable[..., Ran], decoder: Path) -> None:
    given = [*SHORT, "--caches", *KINDS_OF_THE_PAGE, "--scenarios", "decode"]
    found = answer(run("verify-cache", decoder, *given))
    assert {row["cache"] for row in found["checks"]} == {*KINDS_OF_THE_PAGE}
    assert verdicts(found, "default") <= {"rounding", "identical"}
    assert verdicts(found, "exact") == {"identical"}
    words = ["--prompt", "To be", "--max-tokens", "9", "--seed", "1", "--json"]
    texts = {
        kind: answer(run("generate", decoder, *words, "--cache", kind))["results"][0]["text"]
        for kind in ("dynamic", *KINDS_OF_THE_PAGE)
    }
    assert len(set(texts.values())) == 1
    measured = answer(
        run("bench", decoder, "--json", "--lengths", "3", "--repeats", "1", "--prompt-length", "4",
            "--caches", *KINDS_OF_THE_PAGE)
    )  # fmt: skip
    assert [row["cache"] for row in measured["measurements"]] == KINDS_OF_THE_PAGE
    assert all(row["bytes_measured"] == row["bytes_predicted"] for row in measured["measurements"])


# A model family


@pytest.mark.parametrize(
    "check", model_checks.CHECKS, ids=lambda c: c.__name__.removeprefix("check_")
)
def test_the_family_of_the_page_passes_the_contract(check: Callable[[str], None]) -> None:
    check("parallel")


@pytest.fixture(scope="module")
def parallel(added: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the family, with a bound of its own."""
    folder = tmp_path_factory.mktemp("parallel")
    tokenizer = Tokenizer.train("bpe", [TEXT], 260, specials=False)
    config = model_class("parallel").config_class(tokenizer.vocab_size, **SIZES, softcap=3.0)
    torch.manual_seed(0)
    checkpoint.save(folder, build_model(config), tokenizer)
    return folder


def test_a_folder_of_the_family_is_generated_from(run: Callable[..., Ran], parallel: Path) -> None:
    words = ["--prompt", "To be", "--max-tokens", "9", "--temperature", "0", "--json"]
    texts = {
        cache: answer(run("generate", parallel, *words, "--cache", cache))["results"][0]["text"]
        for cache in ("none", "dynamic", "static", "paged")
    }
    assert len(set(texts.values())) == 1 and len(texts["none"]) > 5


def test_a_folder_of_the_family_is_verified(run: Callable[..., Ran], parallel: Path) -> None:
    words = ["--scenarios", "decode", "--caches", "dynamic", "static"]
    found = answer(run("verify-cache", parallel, *SHORT, *words))
    assert verdicts(found, "default") <= {"rounding", "identical"}
    assert verdicts(found, "exact") == {"identical"}


def test_a_folder_of_the_family_is_measured(run: Callable[..., Ran], parallel: Path) -> None:
    words = ["--lengths", "3", "--repeats", "1", "--prompt-length", "4", "--json"]
    found = answer(run("bench", parallel, *words, "--n-kv-heads", "2"))
    assert [row["cache"] for row in found["measurements"]] == ["none", "dynamic", "static"]
    loaded = checkpoint.load(str(parallel), torch.device("cpu"), torch.float32)
    assert (loaded.config.kind, loaded.config.softcap) == ("parallel", 3.0)  # type: ignore[attr-defined]


def test_a_family_is_trained_by_its_name(kv: Callable[..., Ran], tmp_path: Path) -> None:
    data, out = tmp_path / "input.txt", tmp_path / "run"
    data.write_text(TEXT * 60)
    words = ["--data", str(data), "--out", str(out), "--steps", "2", "--d-model", "16"]
    words += ["--heads", "2", "--context", "32", "--batch-tokens", "64", "--threads", "1"]
    ran = kv(*words, "--family", "parallel", command="train-lm")
    assert ran.code == 0, ran.err
    loaded = checkpoint.load(str(out / "best"), torch.device("cpu"), torch.float32)
    assert type(loaded.model).__name__ == "Parallel"
    typo = refused(kv(*words, "--family", "parallell", command="train-lm"))
    assert "'parallell' is not known (expected one of decoder, general, latent, parallel)" in typo
    contradicts = kv(*words, "--family", "seq2seq", command="train-lm")
    assert "an encoder-decoder. Train it with train-seq2seq." in refused(contradicts)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("verify-logits", []),
        ("verify-logits", ["--against", "transformers"]),
        ("bench", ["--impl", "kvtool", "transformers", "--lengths", "3"]),
    ],
)
def test_what_knows_the_decoder_alone_refuses_another_family(
    run: Callable[..., Ran], parallel: Path, command: str, words: list[str]
) -> None:
    assert "parallel" in refused(run(command, parallel, *words))


def test_a_family_without_its_line_is_refused_with_the_way_out(
    parallel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(registry.MODELS, "parallel")
    with pytest.raises(FileError) as caught:
        checkpoint.load(str(parallel), torch.device("cpu"), torch.float32)
    assert "model_type 'kvtool-parallel' is not supported" in caught.value.message
    assert "MODELS" in caught.value.hint


def test_a_field_that_the_family_does_not_know_is_refused(parallel: Path, tmp_path: Path) -> None:
    for path in parallel.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = (parallel / "config.json").read_text()
    for old, new, said in (
        ('"softcap"', '"softcup"', "unknown field 'softcup'"),
        ('"softcap": 3.0', '"softcap": -3.0', "softcap: -3.0 is out of range"),
        ("kvtool-parallel", "kvtool-decoder", "unknown field 'softcap'"),
    ):
        (tmp_path / "config.json").write_text(config.replace(old, new))
        with pytest.raises(FileError, match=said):
            checkpoint.load(str(tmp_path), torch.device("cpu"), torch.float32)


def test_the_names_of_our_families_say_nothing_new() -> None:
    assert ModelConfig(9, family="decoder") == ModelConfig(9)
    pair = {"n_encoder_layers": 1, "source_vocab_size": 9}
    assert ModelConfig(9, **pair, family="seq2seq") == ModelConfig(9, **pair)
    with pytest.raises(UsageError, match="--family: decoder contradicts --encoder-layers"):
        ModelConfig(9, **pair, family="decoder")
