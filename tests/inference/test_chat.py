"""Conversations that go on: what is read, what is kept, and what compiles."""

import dataclasses
import io
import json

import pytest

import atom_jax
from atom_jax.inference import talk
from atom_jax.inference.chat import Chat, prompt
from atom_jax.session import decode, reading
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.tokenizers.train import train
from atom_jax.typing import LM, AtomError
from tests.reliability import rows as examples
from tests.tokenizers.test_chat_template import CHATML

pytestmark = pytest.mark.usefixtures("scanned_policies")


@pytest.fixture(scope="module")
def tokenizer():
    plain = train("bpe:262", [b"hello there, how are you today? "] * 9)
    config = json.loads(plain._files["tokenizer_config.json"]) | {
        "chat_template": CHATML.replace("<|im_end|>", "<|eos|>")
    }
    return JsonTokenizer.from_files(plain._files | {"tokenizer_config.json": json.dumps(config)}, "chat")


def model(tokenizer, memory=None):
    lm = examples.model("qwen3", "plain", memory, 24) if memory else examples.plain("qwen3", "plain")
    cfg = dataclasses.replace(lm.config, max_length=4096, eos_ids=tokenizer.eos_ids)
    return LM(cfg, lm.params, tokenizer.padded(cfg.vocab_size))


def test_a_turn_is_what_the_whole_conversation_would_give(tokenizer):
    lm = model(tokenizer)
    talked, pieces, read, known = Chat(lm, "Be brief."), [], "", []
    for text in ("hello", "how are you?", "today?"):
        whole = prompt(lm, [*talked.messages, {"role": "user", "content": text}])
        assert whole.startswith(read)
        known = [*known, *tokenizer.encode(whole[len(read) :]).tolist()]
        wanted = atom_jax.generate(lm, [known], 12)
        answer = talked.say(text, 12, pieces.append)
        assert answer == wanted.text[0] and talked.last.ids == wanted.ids
        ended = [1] if int(talked.last.memory.token[0]) == 1 else []
        known += [*wanted.ids[0], *ended]
        read = whole + answer + "<|eos|>" * len(ended)
        assert int(talked.last.memory.length[0]) == len(known) - 1
    assert [m["role"] for m in talked.messages] == ["system", *["user", "assistant"] * 3]
    assert "".join(pieces) == "".join(m["content"] for m in talked.messages if m["role"] == "assistant")
    assert talked.last.stats["prompt_tokens"] < len(tokenizer.encode(whole))
    assert isinstance(atom_jax.chat(lm, [{"role": "user", "content": "hello"}], 12), str)


def test_an_interrupted_turn_is_forgotten(tokenizer):
    lm = model(tokenizer)
    talked = Chat(lm)
    first = talked.say("hello", 12)
    before = list(talked.messages)

    def stop(piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talked.say("how are you?", 200, stop)
    assert talked.messages == before
    whole = prompt(lm, [*before, {"role": "user", "content": "today?"}])
    assert before[1]["content"] == first
    assert talked.say("today?", 12) == atom_jax.generate(lm, [tokenizer.encode(whole).tolist()], 12).text[0]


@pytest.mark.parametrize(("memory", "turns"), [(None, 20), ("tova", 20), ("dms", 7)])
def test_turns_neither_grow_nor_compile_while_there_is_room(tokenizer, memory, turns):
    talked, seen = Chat(model(tokenizer, memory)), []
    for _ in range(turns):
        talked.say("hello there", 4)
        session = talked.last.memory
        programs = sum(p._cache_size() for p in (decode.decode, reading.part_in_place, reading._part))
        seen.append((programs, session.nbytes, int(session.use()[0][0])))
        assert session.nbytes <= 2.5 * seen[0][1] * max(1.0, seen[-1][2] / seen[0][2])
    # A compilation comes with another size of the buffers, and sizes are few.
    sizes = len({nbytes for _, nbytes, _ in seen})
    assert seen[-1][0] - seen[1][0] <= 2 * (sizes - 1) and sizes <= 6
    if memory == "dms":
        assert sizes <= 3
    if memory == "tova":
        assert len({nbytes for _, nbytes, _ in seen[2:]}) == 1


def test_models_without_a_template_are_refused(tokenizer):
    lm = model(tokenizer)
    with pytest.raises(AtomError, match="no chat template"):
        Chat(dataclasses.replace(lm, tokenizer=train("bpe:262", [b"hello "])))


def test_input_that_is_no_text(tokenizer, monkeypatch):
    lm = model(tokenizer)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    with pytest.raises(AtomError, match="the input is not valid UTF-8"):
        talk.talk(lambda: Chat(lm), 2)


def test_a_conversation_over_pipes(tokenizer, monkeypatch, capsys):
    lm = model(tokenizer)
    monkeypatch.setattr("sys.stdin", io.StringIO("/stats\nhello\n\n/stats\n/nothing\n/reset\nhello\n/quit\nmore\n"))
    assert talk.talk(lambda: Chat(lm), 12, "A document.")
    out, err = capsys.readouterr()
    answers = out.splitlines()
    first = Chat(lm).say("A document.\n\nhello", 12)
    assert first.splitlines()[0] in answers[0] and "nothing was said yet" in err and "entries held" in err
    assert "no command /nothing" in err and out.count("\n") >= 2


def test_messages_without_an_answer_over_pipes_are_counted(tokenizer, monkeypatch, capsys):
    lm = model(tokenizer)
    monkeypatch.setattr("sys.stdin", io.StringIO("\udcff\nhello\n"))
    assert not talk.talk(lambda: Chat(lm), 2)
    assert "lone surrogate" in capsys.readouterr().err
