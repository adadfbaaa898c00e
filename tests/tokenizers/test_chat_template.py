"""Conversations as text, by the templates of published tokenizers."""

import sys

import pytest

from atom_jax.tokenizers import chat_template
from atom_jax.typing import AtomError

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe good<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ASK = [{"role": "user", "content": "Hé?"}]


def test_a_conversation_is_written_as_the_template_has_it():
    text = chat_template.render(CHATML, ASK)
    assert text == "<|im_start|>system\nBe good<|im_end|>\n<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\n"
    told = [{"role": "system", "content": "Rhyme."}, *ASK, {"role": "assistant", "content": "Hey."}]
    assert chat_template.render(CHATML, told, answer=False).endswith("<|im_start|>assistant\nHey.<|im_end|>\n")


def test_what_published_templates_use_is_there():
    template = (
        "{{ bos_token }}{%- for m in messages %}\n    {%- if loop.index > 5 %}{% break %}{% endif %}\n"
        "    {{- m.content | trim | tojson }}\n{%- endfor %}{{ strftime_now('%Y') | length }}"
    )
    assert chat_template.render(template, [{"role": "user", "content": ' "é" '}], bos_token="<s>") == '<s>"\\"é\\""4'


@pytest.mark.parametrize(
    ("template", "message"),
    [("{% for %}", "cannot write"), ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
     ("{{ messages.append(1) }}", "cannot write"), ("{{ ''.__class__.__mro__ }}", "cannot write"),
     ("{{ range(10**9) | list }}", "cannot write"), ("{{ messages[0].content + 1 }}", "cannot write"),
     ("{{ 1 / 0 }}", "cannot write")],
)  # fmt: skip
def test_bad_templates_are_one_sentence(template, message):
    with pytest.raises(AtomError, match=message):
        chat_template.render(template, ASK)


@pytest.mark.parametrize(
    ("messages", "message"),
    [("hello", "expected a list"), ([], "expected a list"), (["hello"], r"messages\[0\]"),
     ([*ASK, {"role": "user"}], r"messages\[1\]"), ([{"role": "king", "content": ""}], "role 'king'"),
     ([{"role": "user", "content": 3}], r"messages\[0\]")],
)  # fmt: skip
def test_bad_messages_are_one_sentence(messages, message):
    with pytest.raises(AtomError, match=message):
        chat_template.render(CHATML, messages)


BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 9 ** (9 ** 9) }}",
    "{{ 'x' * 10 ** 8 * 9 }}", "{{ [1] * 10 ** 7 * 99 }}", "{{ lipsum(n=10 ** 6) }}",
    "{% for i in x %}" * 30 + "{% endfor %}" * 30, "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
    "{% set s = namespace(x='x' * 10 ** 8) %}{{ s.x }}{{ s.x }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ ''.join(messages) }}", "{{ {}.pop() }}", "{% include 'x' %}", "{% import 'x' as x %}", "{{ x.y.z }}",
]  # fmt: skip


@pytest.mark.parametrize("template", BOMBS, ids=range(len(BOMBS)))
def test_templates_that_never_end_or_grow_are_refused(template, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    before = sys.gettrace()
    with pytest.raises(AtomError) as refused:
        chat_template.render(template, ASK)
    assert len(str(refused.value)) < 300 and sys.gettrace() is before


@pytest.mark.parametrize("found", [3, {"a": 1}, [{"name": "default", "template": 3}]], ids=range(3))
def test_templates_that_are_no_text(found):
    with pytest.raises(AtomError, match="no text"):
        chat_template.of(type("Named", (), {"chat_template": found}))


def test_named_templates_without_a_default():
    found = [{"name": [], "template": "x"}, {"name": {}}, 1, {"name": "tool_use", "template": "y"}]
    assert chat_template.of(type("Named", (), {"chat_template": found})) is None
