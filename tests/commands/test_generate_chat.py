"""generate with instruct models: conversations, special tokens in prompts, and what ends a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import generate_cases
from chat_cases import TEMPLATES, save_instruct, set_generation
from cli_probe import Ran, refused
from generate_cases import texts
from kvtool.commands.generate import command
from kvtool.commands.generate.command import continue_all
from kvtool.commands.generate.results import Result
from kvtool.core.text.tokenizer import Tokenizer
from kvtool.ui.output import Output
from small_models import answer

decoder, seq2seq, generate, stdin = (
    generate_cases.decoder,
    generate_cases.seq2seq,
    generate_cases.generate,
    generate_cases.stdin,
)
GREEDY = ["--temperature", "0", "--max-tokens", "12", "--json"]
MESSAGES = ["Who are you?", "one", "Ä <b>?"]


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_instruct(tmp_path_factory.mktemp("instruct"), TEMPLATES["ChatML"])


@pytest.fixture
def talk(generate: Callable[..., Ran], instruct: Path) -> Callable[..., Ran]:
    return lambda *args, model=instruct: generate(*args, model=model)


def theirs(folder: Path, message: str, system: str | None, n: int = 12) -> list[int]:
    """What transformers answers, and its prompt's length in front."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    first = [] if system is None else [{"role": "system", "content": system}]
    ids = tokenizer.apply_chat_template(
        [*first, {"role": "user", "content": message}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )["input_ids"]
    made = model.generate(ids, do_sample=False, max_new_tokens=n, pad_token_id=0)
    return [ids.shape[1], *made[0, ids.shape[1] :].tolist()]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """Every result with its ids, which no document has."""
    found: list[Result] = []

    def kept(*args: Any) -> list[Result]:
        results = continue_all(*args)
        found.extend(results)
        return results

    monkeypatch.setattr(command, "continue_all", kept)
    return found


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_answer_is_that_of_transformers(
    talk: Callable[..., Ran],
    instruct: Path,
    made: list[Result],
    tmp_path: Path,
    system: str | None,
) -> None:
    path = tmp_path / "in.txt"
    path.write_text("\n".join(MESSAGES))
    words = ["--chat", "--input", str(path), *(["--system", system] if system else [])]
    document = answer(talk(*GREEDY, *words))
    found = [[result.prompt_tokens, *result.ids] for result in made]
    assert found == [theirs(instruct, message, system) for message in MESSAGES]
    assert [result["prompt"] for result in document["results"]] == MESSAGES
    assert document["settings"]["chat"] is True and document["settings"]["system"] == system


def test_a_message_is_the_same_from_every_source(
    talk: Callable[..., Ran], stdin: Callable[[bytes], None], tmp_path: Path
) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"Who\nare you?")
    expected = answer(talk(*GREEDY, "--chat", "--prompt", "Who\nare you?"))["results"]
    assert answer(talk(*GREEDY, "--chat", "--prompt-file", str(path)))["results"] == expected
    stdin(b"Who\nare you?\n")
    assert answer(talk(*GREEDY, "--chat"))["results"] == expected
    plain = answer(talk(*GREEDY, "--prompt", "Who\nare you?"))["results"]
    assert plain[0]["prompt_tokens"] < expected[0]["prompt_tokens"]


def test_only_the_answer_is_printed_and_v_shows_what_the_template_made(
    talk: Callable[..., Ran],
) -> None:
    words = ["--chat", "--prompt", "one", "--temperature", "0", "--max-tokens", "3"]
    ran = talk(*words, "-v")
    assert ran.out == texts(talk(*words, "--json"))[0] + "\n"
    expected = "<|im_start|>system\\nYou help.<|im_end|>\\n<|im_start|>user\\none<|im_end|>\\n"
    assert f"as the template writes it: '{expected}<|im_start|>assistant\\n'" in ran.err


def test_a_terminal_shows_a_prompt_that_goes_on_but_not_a_message(
    talk: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Output, "interactive", True)
    words = ["--prompt", "question", "--temperature", "0", "--max-tokens", "3"]
    assert talk(*words).out.startswith("question")
    assert "question" not in talk("--chat", *words).out


def test_what_a_system_prompt_has_in_common_is_taken_from_a_saved_cache(
    talk: Callable[..., Ran], tmp_path: Path
) -> None:
    words = [*GREEDY, "--chat", "--system", "Be brief.", "--prompt"]
    path = str(tmp_path / "cache")
    talk(*words, "one", "--save-cache", path)
    found = answer(talk(*words, "two", "--load-cache", path))
    assert found["reused_tokens"] > 10
    assert found["results"] == answer(talk(*words, "two"))["results"]


def test_special_tokens_are_text_unless_asked_for_and_that_is_said(
    talk: Callable[..., Ran], instruct: Path, tmp_path: Path
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(instruct)
    path = tmp_path / "prompt.txt"
    path.write_text("<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n")
    words = ["--prompt-file", str(path), *GREEDY]
    spelled = talk(*words, "--special-tokens")
    n = answer(spelled)["results"][0]["prompt_tokens"]
    assert n == len(tokenizer(path.read_text())["input_ids"])
    assert "encoded as text" not in spelled.err
    plain = talk(*words)
    assert answer(plain)["results"][0]["prompt_tokens"] > n
    note = (
        "encoded as text: <|im_end|>, <|im_start|>; --special-tokens makes special tokens of them"
    )
    assert note in plain.err.splitlines()
    assert answer(talk("--chat", *GREEDY, "--prompt", "one"))["results"][0]["prompt_tokens"] > n


@pytest.mark.parametrize("where", ["--prompt", "--system"])
def test_a_message_that_spells_special_tokens_is_text_too(
    talk: Callable[..., Ran], where: str
) -> None:
    given = {"--prompt": "one", "--system": "two", where: "<|im_end|>"}
    words = ["--chat", *GREEDY, *[word for pair in given.items() for word in pair]]
    text, special = talk(*words), talk(*words, "--special-tokens")
    assert "encoded as text: <|im_end|>; --special-tokens" in text.err
    assert "encoded as text" not in special.err
    n = [answer(ran)["results"][0]["prompt_tokens"] for ran in (text, special)]
    assert n[0] > n[1]


def test_a_prompt_without_special_tokens_needs_no_note(talk: Callable[..., Ran]) -> None:
    assert "encoded as text" not in talk("--prompt", "<|im_", "--max-tokens", "2").err


# What ends a text


def copy_of(folder: Path, target: Path, ends: object) -> Path:
    """The same folder, in which `ends` end a text."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).symlink_to(path)
    (target / "generation_config.json").unlink(missing_ok=True)
    return set_generation(target, eos_token_id=ends)


@pytest.mark.parametrize("words", [[], ["--chat"]])
@pytest.mark.parametrize("as_list", [False, True])
def test_every_end_token_of_the_generation_config_ends_a_text(
    talk: Callable[..., Ran],
    instruct: Path,
    made: list[Result],
    tmp_path: Path,
    words: list[str],
    as_list: bool,
) -> None:
    given = [*words, "--prompt", "one", *GREEDY]
    talk(*given)
    (free,) = made
    end = free.ids[5]
    folder = copy_of(instruct, tmp_path / "copy", [319, end] if as_list else end)
    talk(*given, model=folder)
    n = free.ids.index(end) + 1
    assert not free.ended and made[1].ended
    assert made[1].ids == free.ids[:n]
    tokenizer = Tokenizer.load(instruct / "tokenizer.json").as_it_is(frozenset())
    assert made[1].text == tokenizer.decode(free.ids[: n - 1])


def test_every_end_token_ends_a_beam(
    talk: Callable[..., Ran], instruct: Path, tmp_path: Path
) -> None:
    n_vocab = Tokenizer.load(instruct / "tokenizer.json").vocab_size
    folder = copy_of(instruct, tmp_path / "copy", list(range(n_vocab - 1)))  # all but one
    ran = talk("--chat", "--beams", "2", *GREEDY, "--prompt", "a", model=folder)
    (found,) = answer(ran)["results"]
    assert (found["text"], found["new_tokens"], found["ended"]) == ("", 1, True)


# What is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--system x", "--system: needs --chat. It is a message of a conversation."),
        ("--chat", "--chat: {decoder} has no chat template (neither chat_template.jinja nor one"),
        ("--special-tokens", "--special-tokens: the tokenizer of {decoder} has none. Leave it out"),
    ],
)
def test_what_a_model_cannot_do_is_refused(
    generate: Callable[..., Ran], decoder: Path, words: str, message: str
) -> None:
    said = refused(generate("--prompt", "hi", *words.split()))
    assert said.startswith(message.format(decoder=decoder))


@pytest.mark.parametrize("word", ["--chat", "--special-tokens"])
def test_an_encoder_decoder_takes_no_conversation(
    generate: Callable[..., Ran], seq2seq: Path, word: str
) -> None:
    message = refused(generate("--prompt", "jail", word, model=seq2seq))
    assert message.startswith(f"{word}: {seq2seq} is an encoder-decoder, ")
    assert message.endswith("Leave --chat out." if word == "--chat" else "Leave it out.")


def test_a_system_prompt_that_is_not_utf8_is_refused_by_its_name(
    talk: Callable[..., Ran],
) -> None:
    message = refused(talk("--chat", "--prompt", "a", "--system", "a\udcff"))
    assert message.startswith("--system: is not UTF-8 (byte 0xff at offset 1)")


def test_a_conversation_that_is_too_long_is_refused_by_its_line(
    talk: Callable[..., Ran], tmp_path: Path
) -> None:
    path = tmp_path / "in.txt"
    path.write_text(f"one\n\n{'x' * 300}\n")
    message = refused(talk("--chat", "--input", str(path)))
    assert message.startswith(f"{path}: line 3: the prompt is ")


def test_the_settings_of_a_conversation_are_in_the_document(talk: Callable[..., Ran]) -> None:
    settings = answer(talk("--prompt", "a", *GREEDY))["settings"]
    assert (settings["chat"], settings["system"], settings["special_tokens"]) == (
        False,
        None,
        False,
    )
    assert json.dumps(settings)


@pytest.mark.parametrize("source", ["{# nothing #}", "{{ none.x }}", "{{ ''|attr('__class__') }}"])
def test_a_template_that_writes_nothing_is_blamed_and_not_the_prompt(
    generate: Callable[..., Ran], tmp_path: Path, source: str
) -> None:
    folder = save_instruct(tmp_path / "instruct", source)
    said = refused(generate("--chat", "--prompt", "hi", model=folder))
    assert said.startswith("--chat: the template in ")
    assert "writes nothing for this conversation" in said
