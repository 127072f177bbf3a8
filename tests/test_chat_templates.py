"""Chat templates that come with a model: rendered as transformers does, or refused in one line and bounded time."""

import time
from pathlib import Path

import pytest

from s1jax.chat_template import TemplateError, render_chat
from s1jax.decoding.profiles import load_profile, prepare_prompt, tokenize_profile
from s1jax.decoding.requests import encode_prompt
from s1jax.tokenizer import load_tokenizer
from tests import templates, tiny

QUESTION = [{"role": "user", "content": "What is 3 + 4?"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "7."}, *QUESTION]
_DOUBLED = "{% set ns = namespace(t='x' * 1000) %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}"

BROKEN = {
    "{{ raise_exception('Roles must alternate') }}": "line 1: Roles must alternate",
    "a\n{% for m in messages %}": "line 2: Unexpected end of template",
    "\n{{ 1 / 0 }}": "line 2: ZeroDivisionError: division by zero",
    "{{ messages[0].content + 3 }}": 'line 1: TypeError: can only concatenate str (not "int") to str',
    "{{ messages[7].content }}": "line 1: list object has no element 7",
    "{{ nothing.at.all }}": "line 1: 'nothing' is undefined",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "line 1: RecursionError: ",
    "{{ ''.__class__.__mro__ }}": "line 1: access to attribute '__class__' of 'str' object is unsafe",
    "{{ messages.append(1) }}": "line 1: access to attribute 'append' of 'list' object is unsafe.",
    "{% for i in range(10**9) %}x{% endfor %}": "line 1: OverflowError: Range too big",
    "{{ 'x' * 10**7 }}": "it writes 10,000,000 characters",
    "{{ 'x' * 10**11 }}": "it takes more than 1024 MiB of memory",
    _DOUBLED: "it takes more than 1024 MiB of memory",
    "{{ '\\ud800' }}": "it writes a lone surrogate, '\\ud800'",
    "{{ '%99999999999d' % 1 }}": "memory",
    "(" * 10_000 + "{{ " + "(" * 10_000 + "}}": "Error",
    "{% include 'x' %}": "line 1: ",
}


def saved(directory: Path, template: str) -> Path:
    tiny.tokenizer(directory)
    (directory / "chat_template.jinja").write_text(template)
    return directory


@pytest.mark.parametrize(("template", "said"), BROKEN.items(), ids=range(len(BROKEN)))
def test_what_is_wrong_with_a_template_is_one_line(tmp_path: Path, template: str, said: str) -> None:
    tokenizer = load_tokenizer(saved(tmp_path, template))
    with pytest.raises(TemplateError) as error:
        render_chat(QUESTION, tokenizer, add_generation_prompt=True)
    message = str(error.value)
    assert f"{tmp_path / 'chat_template.jinja'} fails: " in message
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "loop",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set x = 7 ** (10 ** 9) %}",
    ],
)
def test_a_template_that_loops_is_ended_and_not_tried_again(
    tmp_path: Path, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s1jax.chat_template.SECONDS", 0.5)
    tokenizer = load_tokenizer(saved(tmp_path, loop))
    began = time.monotonic()
    for _ in range(50):
        with pytest.raises(TemplateError, match=r"it takes more than 0\.5 s"):
            render_chat(QUESTION, tokenizer, add_generation_prompt=True)
    assert time.monotonic() - began < 20
    other = load_tokenizer(saved(tmp_path / "other", "{{ messages[0].content }}"))
    assert render_chat(QUESTION, other, add_generation_prompt=True) == QUESTION[0]["content"]


@pytest.mark.parametrize("name", ["QWEN25", "QWEN3", "QWQ", "TRIMMED"])
@pytest.mark.parametrize("opened", [True, False])
def test_it_is_the_text_of_transformers(tmp_path: Path, name: str, opened: bool) -> None:
    tokenizer = load_tokenizer(saved(tmp_path, getattr(templates, name)))
    for messages in (QUESTION, ANSWERED):
        theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
        assert render_chat(messages, tokenizer, add_generation_prompt=opened) == theirs


def test_without_a_template_it_says_what_to_do(tmp_path: Path) -> None:
    tiny.tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(TemplateError, match=r"tokenizer_config\.json: there is no chat template .*chat_template=false"):
        render_chat(QUESTION, load_tokenizer(tmp_path), add_generation_prompt=True)


# As DeepSeek's distilled models: there is no end of a turn after the user's, and the thought is opened for the model.
_R1 = (
    "{%- for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}"
    "{% else %}Assistant: {{ m.content }}{% endif %}{% endfor %}"
)
_OPENED = _R1 + "{% if add_generation_prompt %}Assistant: <think>\n{% endif %}"
_PLAIN = _R1 + "{% if add_generation_prompt %}Assistant: {% endif %}"
_NAMED = "What does <think>\n mean?"


@pytest.mark.parametrize(
    ("template", "messages", "added", "thinking"),
    [
        (_PLAIN, [("user", "Hi")], "<think>\n", ""),
        (_PLAIN, [("user", _NAMED)], "<think>\n", ""),
        (_PLAIN, [("user", "<think>")], "<think>\n", ""),
        (_PLAIN, [("user", "<think>\n")], "<think>\n", ""),
        (_PLAIN, [("user", "\ue000"), ("user", "<think>\ue000 ")], "<think>\n", ""),
        (_PLAIN, [("system", _NAMED), ("user", "Hi")], "<think>\n", ""),
        (_PLAIN, [("user", "Hi"), ("assistant", "<think>\nSo"), ("user", "Go on")], "<think>\n", ""),
        (_PLAIN, [("user", _NAMED), ("assistant", "<think>\nSo")], "", "SoAssistant: "),
        (_PLAIN, [("assistant", "<think>\nSo")], "", "SoAssistant: "),
        (_OPENED, [("user", "Hi")], "", ""),
        (_OPENED, [("user", _NAMED)], "", ""),
        (_OPENED.replace("{{ m.content }}", "{{ m.content | trim | upper }}"), [("user", _NAMED + "\n")], "", ""),
    ],
)
def test_an_open_thought_is_the_templates_or_the_assistants(
    tmp_path: Path, template: str, messages: list[tuple[str, str]], added: str, thinking: str
) -> None:
    profile = load_profile("deepseek-r1")
    directory = saved(tmp_path, template)
    tokenizer = load_tokenizer(directory)
    tokenizer.add_tokens([*profile.eos])
    ids = tokenize_profile(profile, tokenizer, 384)
    conversation = [{"role": role, "content": content} for role, content in messages]
    encoded = encode_prompt(conversation, tokenizer, chat_template=True)
    prepared = prepare_prompt(encoded.input_ids, ids, encoded.after_user)
    text = render_chat(conversation, tokenizer, add_generation_prompt=True)
    assert tokenizer.decode(prepared.prompt_ids) == text + added
    assert prepared.num_thinking_tokens == len(tokenizer.encode(thinking, add_special_tokens=False))
