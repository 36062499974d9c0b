"""The whole way on a folder as the hub has them: three shards, a tokenizer, every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

import bench_cases
from cli_probe import Ran, refused
from family_cases import MISTRAL, build, load, save
from kvtool import registry
from kvtool.core.text.tokenizer import Tokenizer
from small_models import TEXT, answer

small_array = bench_cases.small_array
PROMPT = "To be, or not"
LOSSLESS = [kind for kind in registry.CACHES if not kind.startswith(("int", "fp"))]
INDEX, PICKLED = "model.safetensors.index.json", "pytorch_model.bin.index.json"


def byte_level() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    made.train_from_iterator([TEXT] * 3, trainer)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 60,000 random weights with two key-value heads for four heads."""
    folder, tokenizer = tmp_path_factory.mktemp("hub") / "llama", byte_level()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    save(transformers.LlamaForCausalLM(config), folder, max_shard_size="100KB")
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(list(folder.glob("model-0000?-of-00003.safetensors"))) == 3
    return folder


@pytest.fixture
def pickled(folder: Path, tmp_path: Path) -> Path:
    """The same in shards that torch.save wrote, as older repositories have them."""
    copy = Path(shutil.copytree(folder, tmp_path / "pickled"))
    index = json.loads((copy / INDEX).read_text())
    for path in copy.glob("*.safetensors"):
        torch.save(safetensors.torch.load_file(path), copy / bin_name(path.name))
        path.unlink()
    (copy / INDEX).unlink()
    index["weight_map"] = {name: bin_name(place) for name, place in index["weight_map"].items()}
    (copy / PICKLED).write_text(json.dumps(index))
    return copy


def bin_name(shard: str) -> str:
    return f"pytorch_{Path(shard).stem}.bin"


def expected_text(folder: Path, n_new: int) -> str:
    """What transformers and tokenizers make of PROMPT."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    found = model.generate(ids, max_new_tokens=n_new, do_sample=False)
    return tokenizer.decode(found[0, ids.shape[1] :].tolist())


def test_every_cache_is_right_on_it(kv: Callable[..., Ran], folder: Path) -> None:
    words = f"--model {folder} --scenarios decode --tokens 6 --threads 1 --json"
    document = answer(kv(*words.split(), command="verify-cache"))
    found = {(row["cache"], row["verdict"]) for row in document["checks"]}
    cached = {kind for kind in registry.CACHES if kind != "none"}
    assert {kind for kind, _ in found} == set(registry.CACHES)
    assert {verdict for kind, verdict in found if kind in cached} == {"rounding", "identical"}
    assert document["control"]["verdict"] == "bug"


def test_its_logits_are_those_of_transformers(kv: Callable[..., Ran], folder: Path) -> None:
    words = f"--model {folder} --against transformers --threads 1 --json"
    document = answer(kv(*words.split(), command="verify-logits"))
    assert document["worst_float64"] < 1e-13 and document["tokens_agree"]


@pytest.mark.parametrize("kind", LOSSLESS)
def test_text_continues_as_with_transformers(
    kind: str, kv: Callable[..., Ran], folder: Path
) -> None:
    words = f"--model {folder} --temperature 0 --max-tokens 12 --threads 1 --json --cache {kind}"
    (result,) = answer(kv(*words.split(), "--prompt", PROMPT, command="generate"))["results"]
    assert result["text"] == expected_text(folder, 12)


@pytest.fixture
def bars() -> Iterator[None]:
    """transformers as it is by itself: it tells how far it is."""
    transformers.utils.logging.enable_progress_bar()
    yield
    transformers.utils.logging.disable_progress_bar()


def test_every_cache_is_timed_on_it_and_transformers_beside(
    kv: Callable[..., Ran], folder: Path, bars: None
) -> None:
    words = f"--model {folder} --lengths 3 5 --repeats 1 --prompt-length 4 --threads 1 --json"
    ran = kv(*words.split(), "--caches", "all", "--impl", "kvtool,transformers", command="bench")
    document = answer(ran)
    measured = {(row["impl"], row["cache"]) for row in document["measurements"]}
    theirs = {("transformers", kind) for kind in ("none", "dynamic", "static")}
    assert measured == {("kvtool", kind) for kind in registry.CACHES} | theirs
    assert all(len(row["samples_s"]) == 1 for row in document["measurements"])
    assert document["resolved"]["architecture"] == "LlamaForCausalLM"
    assert "LlamaForCausalLM: the same 16 greedy tokens as kvtool in float32" in ran.err
    assert "Loading" not in ran.err
    assert transformers.utils.logging.is_progress_bar_enabled()
    alone = answer(kv(*words.split(), command="bench"))
    assert {row["impl"] for row in alone["measurements"]} == {"kvtool"}


# --- shards that torch.save wrote


def test_pickled_shards_are_the_same_model_for_both(
    kv: Callable[..., Ran], folder: Path, pickled: Path
) -> None:
    weights, others = (load(each).model.state_dict() for each in (folder, pickled))
    assert all(others[name].equal(weight) for name, weight in weights.items())
    words = f"--model {pickled} --lengths 3 --repeats 1 --threads 1 --impl transformers --json"
    found = answer(kv(*words.split(), "--dtype", "bfloat16", command="bench"))["resolved"]
    assert found["agreement"]["same"] == 16 and found["agreement"]["gap"] < 1e-5


class Code:
    """Runs when it is unpickled."""

    ran = False

    def __reduce__(self) -> tuple[object, ...]:
        return setattr, (Code, "ran", True)


def test_code_in_a_pickled_shard_does_not_run(kv: Callable[..., Ran], pickled: Path) -> None:
    shard = sorted(pickled.glob("*.bin"))[1]
    torch.save({"a": Code()}, shard)
    message = refused(kv("--model", str(pickled), "--prompt", PROMPT, command="generate"))
    assert message.startswith(f"{shard}: holds code objects, which kvtool never runs")
    assert not Code.ran


@pytest.mark.parametrize("form", [INDEX, PICKLED])
def test_an_index_that_contradicts_its_shards_is_one_line(
    form: str, kv: Callable[..., Ran], folder: Path, pickled: Path, tmp_path: Path
) -> None:
    copy = pickled if form == PICKLED else Path(shutil.copytree(folder, tmp_path / "copy"))
    index = json.loads((copy / form).read_text())
    head = "lm_head.weight"
    first, second, third = sorted(set(index["weight_map"].values()))

    def said(place: str) -> str:
        changed = {"weight_map": {**index["weight_map"], head: place}}
        (copy / form).write_text(json.dumps(changed))
        message = refused(kv("--model", str(copy), "--prompt", PROMPT, command="generate"))
        assert message.startswith(f"{copy}/")
        return message.removeprefix(f"{copy}/")

    assert index["weight_map"][head] == third
    assert said("../secret").startswith(f"{form}: places {head} in '../secret' (expected a file")
    assert said("/etc/passwd").startswith(f"{form}: places {head} in '/etc/passwd'")
    assert said(first).startswith(f"{form}: places {head} in {first}, which does not hold it")
    assert said("none").startswith("none: not found")
    with_head(copy / second, head)
    assert said(third) == f"{form}: places {head} in {third}, but {second} holds one too"
    (copy / first).unlink()
    assert said(third).startswith(f"{first}: not found")


def with_head(path: Path, name: str) -> None:
    """Put a tensor of that name into a shard that has others."""
    if path.suffix == ".bin":
        torch.save({**torch.load(path), name: torch.ones(2)}, path)
    else:
        tensors = {**safetensors.torch.load_file(path), name: torch.ones(2)}
        safetensors.torch.save_file(tensors, path)


# --- a window of its own


def test_a_sliding_cache_has_the_models_own_window_if_none_is_given(
    kv: Callable[..., Ran], tmp_path: Path
) -> None:
    """Then nothing that the model would see is evicted; a narrower one is another model."""
    folder = save(build({**MISTRAL, "sliding_window": 7}), tmp_path)
    Tokenizer.train("char", ["abcdefghij klmnopqrstuvwxyz"]).save(folder / "tokenizer.json")
    words = f"--model {folder} --prompt abacus --temperature 0 --max-tokens 30 --threads 1 --json"

    def text(*cache: str) -> tuple[str, str]:
        found = answer(kv(*words.split(), *cache, command="generate"))
        return found["cache"], found["results"][0]["text"]

    whole = text()[1]
    assert text("--cache", "sliding") == ("sliding:window=7", whole)
    assert text("--cache", "sliding:sinks=0") == ("sliding:sinks=0:window=7", whole)
    assert text("--cache", "sliding", "--window", "9")[0] == "sliding:window=9"
    name, other = text("--cache", "sliding:window=2")
    assert name == "sliding:window=2" and other != whole
    timed = "--lengths 20 --repeats 1 --prompt-length 4 --caches sliding --json"
    document = answer(kv("--model", str(folder), *timed.split(), command="bench"))
    assert document["measurements"][0]["cache"] == "sliding:window=7"
    assert document["quality"]["sliding:window=7"]["kl"] < 1e-6
