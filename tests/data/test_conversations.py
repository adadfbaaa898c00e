"""Conversations: records, whose answers alone are learned, in rows that hold them whole."""

import json

import numpy as np
import pytest

from atom_jax.data.config import DataConfig
from atom_jax.data.conversations import conversation, conversation_tokens
from atom_jax.data.fetch import chats
from atom_jax.data.pipeline import make_iterator, remarks
from atom_jax.data.sources import open_source
from atom_jax.tokenizers import ByteTokenizer, chat_template
from atom_jax.typing import AtomError
from tests.inference.test_chat import tokenizer  # noqa: F401 (a fixture)

# Writes an earlier answer in capitals once the conversation has gone on.
FORGETFUL = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'] | upper }}{% else %}{{ m['content'] }}{% endif %}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Templated(ByteTokenizer):
    """Bytes with a chat template."""

    chat_template = FORGETFUL


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def learned(tokens, tokenizer):  # noqa: F811
    return tokenizer.decode(tokens.ids[tokens.learned])


def piece(**record):
    return {"text": conversation(record, "here")}


def test_answers_with_what_ends_them_are_learned(tokenizer):  # noqa: F811
    said = turns("hello", "hello there, how are you?", "and today?", "there é")
    tokens = conversation_tokens(piece(messages=said), tokenizer)
    assert tokenizer.decode(tokens.ids) == chat_template.written(tokenizer, said, answer=False)
    assert learned(tokens, tokenizer) == "hello there, how are you?<|eos|>there é<|eos|>"
    one = conversation_tokens(piece(prompt="hello", completion="today"), tokenizer)
    same = conversation_tokens(piece(messages=turns("hello", "today")), tokenizer)
    np.testing.assert_array_equal(one.ids, same.ids)
    np.testing.assert_array_equal(one.learned, same.learned)


def test_answers_that_are_rewritten_later_are_only_read():
    tokens = conversation_tokens(piece(messages=turns("a", "first", "b", "second")), Templated())
    assert b"FIRST" in bytes(tokens.ids.tolist()) and learned(tokens, Templated()) == "second</>"
    alone = type("Alone", (Templated,), {"chat_template": FORGETFUL.replace("<assistant>", "<other>")})()
    with pytest.raises(AtomError, match="writes answers otherwise than it asks for them"):
        conversation_tokens(piece(messages=turns("a", "first")), alone)


def test_without_a_template_a_completion_follows_its_prompt():
    plain = ByteTokenizer()
    tokens = conversation_tokens(piece(prompt="2 + 2 =", completion=" 4é"), plain)
    assert tokens.ids.tolist() == [256, *b"2 + 2 = 4\xc3\xa9", 257]
    assert tokens.ids[tokens.learned].tolist() == [*b" 4\xc3\xa9", 257]
    with pytest.raises(AtomError, match="the tokenizer has no chat template"):
        conversation_tokens(piece(messages=turns("a", "b")), plain)


def test_records_of_every_kind(tmp_path):
    said = turns("a", "b\nc")
    records = [{"messages": said}, {"prompt": "p", "completion": "c"}]
    records.append({"prompt": said[:1], "completion": said[1:]})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "a.json").write_text(json.dumps(records))
    for name in ("a.jsonl", "a.json"):
        corpus = open_source(str(tmp_path / name), "all", chat=True)
        found = [json.loads(corpus.read(i)) for i in range(len(corpus))]
        assert found == [{"messages": said}, records[1], {"messages": said}]
    (tmp_path / "b.csv").write_text("prompt,completion\np,c\n")
    assert json.loads(open_source(str(tmp_path / "b.csv"), "all", chat=True).read(0)) == records[1]
    (tmp_path / "c.jsonl").write_text(json.dumps({"talk": said}) + "\n")
    assert json.loads(open_source(f"{tmp_path / 'c.jsonl'}#talk", "all", chat=True).read(0)) == {"messages": said}


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    said = [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b", "name": None}]
    parquet.write_table(pyarrow.table({"messages": [said], "text": ["words é"]}), tmp_path / "a.parquet")
    (tmp_path / "data").write_bytes((tmp_path / "a.parquet").read_bytes())
    for name in ("a.parquet", "data"):
        assert open_source(str(tmp_path / name), "all").read(0) == "words é".encode()
        found = json.loads(open_source(str(tmp_path / name), "all", chat=True).read(0))
        assert found == {"messages": [said[0], {"role": "assistant", "content": "b"}]}
    (tmp_path / "b.parquet").write_bytes(b"PAR1....PAR1")
    with pytest.raises(AtomError, match=r"b\.parquet is not parquet, or damaged"):
        open_source(str(tmp_path / "b.parquet"), "all")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "line 1 has no messages under the field 'messages', and no prompt with a completion"),
        ({"prompt": "a", "completion": 3}, "line 1 has no messages"),
        ({"messages": "a"}, "line 1 has no messages"),
        ({"messages": [{"role": "user"}]}, r"line 1: messages\[0\]: expected"),
        ({"messages": [{"role": "poet", "content": "a"}]}, r"line 1: messages\[0\]: role 'poet'"),
        ({"messages": [3]}, r"line 1: messages\[0\]: expected"),
        ({"messages": []}, "line 1: messages: expected a list"),
        (3, "line 1 is no record with fields"),
    ],
)
def test_other_records_are_refused(tmp_path, record, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(AtomError, match=message):
        open_source(str(tmp_path / "a.jsonl"), "all", chat=True)


def test_sources_without_conversations_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "p", "completion": "c"}) + "\n")
    for source, message in (
        (tmp_path / "a.txt", "holds text files"),
        (tmp_path / "b.jsonl", "holds 1 conversations"),
    ):
        with pytest.raises(AtomError, match=message):
            open_source(str(source), "train", chat=True)
    with pytest.raises(AtomError, match="There is no source austen"):
        open_source("austen", "train", chat=True)
    with pytest.raises(AtomError, match=r"data\.chat: set data\.whole"):
        DataConfig(chat=True)


def test_rows_hold_conversations_whole(tmp_path, tokenizer):  # noqa: F811
    rng = np.random.default_rng(0)
    words = ["hello", "there", "how", "are", "you", "today?"]
    talks = [turns(*(" ".join(rng.choice(words, rng.integers(1, 4))) for _ in range(4))) for _ in range(40)]
    talks.append(turns("hello " * 90, "there"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    cfg = DataConfig(
        sources=(str(tmp_path / "a.jsonl"),), split="train", chat=True, whole=True, seq_len=400, batch_size=2
    )
    whole = {chat_template.written(tokenizer, talk, answer=False) for talk in talks}
    data = make_iterator(cfg, tokenizer)
    batches = [next(data) for _ in range(3)]
    state, following = data.get_state(), next(data)
    data.close()
    packed = 0
    for batch in batches:
        for row in range(2):
            one = {k: v[row] for k, v in batch.items()}
            assert not one["loss_mask"][one["segments"] == 0].any()
            packed += one["segments"].max() > 1
            for segment in range(1, one["segments"].max() + 1):
                here = one["segments"] == segment
                assert tokenizer.decode(one["ids"][here]) in whole
                assert one["positions"][here].tolist() == list(range(here.sum()))
                assert tokenizer.decode(one["targets"][here & one["loss_mask"]]).count("<|eos|>") == 2
    assert packed > 3
    again = make_iterator(cfg, tokenizer)
    again.set_state(state)
    np.testing.assert_array_equal(next(again)["loss_mask"], following["loss_mask"])
    again.close()
    assert any("longer than 400 tokens" in line for line in remarks(cfg, tokenizer, 9))


def test_tiny_texts_are_remarked_upon(tmp_path):
    (tmp_path / "a.txt").write_text("few words. " * 20)
    cfg = DataConfig(sources=(str(tmp_path / "a.txt"),), seq_len=64, batch_size=4)
    (note,) = remarks(cfg, ByteTokenizer(), 1)
    assert note.startswith("data: the train split is tiny, ") and note.endswith("one batch has 4 rows of 64 tokens")
    assert not remarks(cfg, ByteTokenizer(), 10_000)
    assert not remarks(DataConfig(sources=(str(tmp_path / "a.txt"),), seq_len=16, batch_size=4), ByteTokenizer(), 1)


def test_small_talk_has_two_people_who_take_turns():
    said = [("x", "hi"), ("x", "you there?"), ("y", " yes "), ("y", ""), ("x", "good"), ("y", "so"), ("x", "bye")]
    talk = {"messages": [[{"sender": who, "text": text}] for who, text in said]}
    assert chats.messages(talk) == turns("hi\nyou there?", "yes", "good", "so")
    talk["messages"].append([{"sender": "z", "text": "hm"}])
    assert chats.messages(talk) == []
