import dataclasses

import numpy as np
import pytest

from atom_jax import config
from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.tasks import EvalConfig, characters
from atom_jax.evaluation.tasks.characters import KINDS, Characters, CharacterSettings, questions
from atom_jax.typing import AtomError
from tests.evaluation.tasks.test_tasks import BYTES, result
from tests.models.tiny_bolmo import model

FEW = CharacterSettings(documents=5, shots=2)


def test_operations_by_hand():
    made = {kind: f("letter", "t", "z")[1] for kind, f in KINDS.items()}
    assert made == {
        "spelling": "l e t t e r", "reversal": "rettel", "deletion": "leer", "insertion": "letztzer",
        "substitution": "lezzer", "swap": "rettel",
    }  # fmt: skip
    assert KINDS["swap"]("river", "r", "z")[1] == "river" and KINDS["swap"]("words", "w", "z")[1] == "sordw"


def test_questions_have_one_right_answer_at_any_place():
    made = questions(dataclasses.replace(FEW, documents=40))
    assert len(made) == 6 * 40 and made == questions(dataclasses.replace(FEW, documents=40))
    golds = np.bincount([r.gold for r in made])
    assert len(golds) == 4 and golds.min() > 30
    for request in made:
        question = request.contexts[0].splitlines()[-2].removeprefix("Question: ")
        letters = question.split('"')[1::2]
        word, *others = sorted(letters, key=len, reverse=True)
        kind = next(k for k, f in KINDS.items() if f("w", "a", "b")[0].split()[0] == question.split()[0])
        if kind in ("insertion", "substitution"):
            # They name their letters in different orders.
            others = others[::-1] if kind == "insertion" else others
        answer = KINDS[kind](word, *[*others, "", ""][:2])[1]
        assert request.continuations[request.gold] == f" {answer}"
        assert len({*request.continuations}) == 4
        assert request.contexts[0].count("Question:") == 3 and request.contexts[0].endswith("Answer:")


def test_every_kind_is_scored(lm):
    found = result(lm, Characters(), FEW, dataclasses.replace(BYTES, length=512))
    parts = [m.value for name, m in found.metrics.items() if name.startswith("acc_") and name[4:] in KINDS]
    assert len(parts) == 6 and np.mean(parts) == pytest.approx(found.metrics["acc"].value)
    assert found.count == 30 and found.notes["chance"] == 0.25


def test_a_bolmo_answers():
    few = dataclasses.replace(FEW, documents=1, shots=0, kinds=("spelling", "swap"))
    found = result(model(), Characters(), few, Encoder(model().tokenizer, 128, True))
    assert found.count == 2 and found.notes["cut"] == 0


def test_bad_settings_are_one_sentence():
    assert config.override(EvalConfig(), ["characters.kinds=swap"]).characters.kinds == ("swap",)
    with pytest.raises(AtomError, match="no kind 'rot13'; expected some of spelling"):
        config.override(EvalConfig(), ["characters.kinds=rot13"])
    with pytest.raises(AtomError, match="there are"):
        questions(dataclasses.replace(FEW, documents=10**6))
    assert len(characters._words()) > 4000
