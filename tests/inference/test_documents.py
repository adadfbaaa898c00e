"""Documents that are read once: every question as if it were alone with the document."""

import pytest

import atom_jax
from atom_jax.inference import documents
from atom_jax.inference.chat import prompt
from atom_jax.inference.generate import Generation
from atom_jax.kvcache.dms import DMS
from atom_jax.kvcache.tova import TOVA
from atom_jax.models import registry
from atom_jax.session import reading
from atom_jax.typing import AtomError
from tests.inference.test_chat import model, tokenizer  # noqa: F401 (a fixture)

DOCUMENT, QUESTIONS = "hello there, how are you today? " * 6, ("how are you?", "hello there?")


@pytest.mark.parametrize(
    "memory", [None, TOVA(budget=40), DMS(form="borrowed", window=8, scale=4.0, offset=0.0, page=8)], ids=str
)
def test_every_question_starts_from_the_document(tokenizer, memory, monkeypatch, scanned):  # noqa: F811
    monkeypatch.setattr(reading, "PART", 64)
    monkeypatch.setattr(DMS, "part", 64)
    lm, seen, pieces = registry.with_memory(model(tokenizer), memory), [], ["", ""]

    def say(number, piece):
        pieces[number] += piece

    found = list(documents.ask(lm, DOCUMENT, QUESTIONS, (), 6, lambda *at: seen.append(at), say))
    assert pieces == [one.text[0] for one in found]
    begins = prompt(lm, [{"role": "user", "content": f"{DOCUMENT}\n\n§"}]).partition("§")[0]
    total = len(tokenizer.encode(begins))
    in_parts = [(min(at, total), total) for at in range(64, total + 64, 64)]
    assert seen == ([] if isinstance(memory, TOVA) else in_parts)
    for question, one in zip(QUESTIONS, found):
        whole = prompt(lm, [{"role": "user", "content": f"{DOCUMENT}\n\n{question}"}])
        before = Generation([[]], None, {}, memory=atom_jax.Session.prefill(lm, [tokenizer.encode(begins)]))
        later = atom_jax.generate(lm, [tokenizer.encode(whole[len(begins) :]).tolist()], 6, after=before)
        assert one.ids == later.ids and one.stats["prompt_tokens"] == later.stats["prompt_tokens"]
        if memory is None:
            assert one.ids == atom_jax.generate(lm, [tokenizer.encode(whole).tolist()], 6).ids


def test_what_cannot_be_asked_is_refused(tokenizer):  # noqa: F811
    lm = model(tokenizer)
    with pytest.raises(AtomError, match="there is no question"):
        next(documents.ask(lm, DOCUMENT))
    with pytest.raises(AtomError, match=r"takes \d+ positions, the model has 4096"):
        next(documents.ask(lm, DOCUMENT, QUESTIONS, max_new_tokens=4000))
