"""Chat templates of the kinds that instruct models bring, and tiny folders that have one."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

import family_cases
from kvtool.core.text.chat import Message

TURNS: list[list[Message]] = [
    [{"role": "user", "content": "Who are you?"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "  Ä <b>? \n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three\n\n"},
    ],
]

# Small templates of the structure that these families have, in words of our own.
TEMPLATES = {
    "ChatML": """\
{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}\
{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}\
{% endif %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "Llama 3": """\
{{- bos_token }}
{%- if tools is not none %}{{- raise_exception('no tools here') }}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{%- if not date_string is defined %}{%- set date_string = strftime_now('%%d') %}{%- endif %}
{{- '<|head|>system<|/head|>\n\nToday: ' + date_string + '\n' + system_message + '<|eot|>' }}
{%- for message in messages %}
    {{- '<|head|>' + message.role + '<|/head|>\n\n' + message.content | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\n\n' }}
{%- endif %}
""",
    "Mistral": """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{% set loop_messages = messages[1:] %}{% set first = messages[0]['content'] ~ '\n\n' %}
{% else %}{% set loop_messages = messages %}{% set first = '' %}{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must take turns') }}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ ' [INST] ' + (first if loop.first else '') + message['content'].strip() + ' [/INST]' }}
    {% else %}
{{ ' ' + message['content'] + eos_token }}
    {% endif %}
{% endfor %}
""",
    "Gemma": """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}\
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}\
{% else %}{% set role = message['role'] %}{% endif %}\
{{ '<start>' + role + '\n' + message['content'] | trim + '<end>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{'<start>model\n'}}{% endif %}""",
    "Qwen": """\
{%- if tools %}
    {{- '<tools>' + tools | tojson + '</tools>' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == "user" and not (message.content.startswith('<r>')) %}
        {%- set ns.found = true %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
        {{- content + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}""",
    "Zephyr": """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "every extension": """\
{%- macro turn(role, text) %}[{{ role }}:{{ text }}]{% endmacro %}
{%- set seen = dict.fromkeys(['user'], 0) %}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
  {% generation %}{{ turn(message.role, message.content | tojson) }}{% endgeneration %}
    {% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}
{{ {'b': '<é>', 'a': [1, none, true]} | tojson(indent=2) }} {{ dict(a=seen) | tojson }}
{{- unknown_token }}{{ pad_token | default('no padding') }}
<|assistant|>
""",
}
SPECIALS = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
OTHERS = ["<|im_start|>", "<|eot|>", "<|head|>", "<|/head|>", "<start>", "<end>", "<|assistant|>"]


def make_tokenizer(
    template: str | None = None, blank_in_front: bool = False
) -> transformers.PreTrainedTokenizerFast:
    """Byte-level, with special tokens, as transformers has it."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=blank_in_front)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        ["assistant user system are you"] * 9,
        trainers.BpeTrainer(
            vocab_size=320,
            initial_alphabet=sorted(alphabet),
            special_tokens=[*SPECIALS.values(), *OTHERS],
            show_progress=False,
        ),
    )
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIALS)
    found.chat_template = template
    return found


def save_instruct(folder: Path, template: str | None, in_config: bool = False) -> Path:
    """A folder with a tiny Llama and a tokenizer, whose template is in its config or a file."""
    tokenizer = make_tokenizer(template)
    fields = {**family_cases.LLAMA, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    family_cases.save(family_cases.build(fields).to(torch.float32), folder)
    tokenizer.save_pretrained(folder, save_jinja_files=not in_config)
    return folder


def set_generation(folder: Path, **fields: object) -> Path:
    """Change generation_config.json."""
    path = folder / "generation_config.json"
    data = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**data, **fields}))
    return folder
