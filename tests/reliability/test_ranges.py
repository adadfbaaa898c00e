"""Numbers and words out of their range: one short sentence that names the field and its range, wherever it enters."""

import dataclasses
import math

import jax
import pytest

import atom_jax
from atom_jax import config
from atom_jax.__main__ import main
from atom_jax.data import facts
from atom_jax.evaluation.reports import chains
from atom_jax.evaluation.tasks import EvalConfig
from atom_jax.kvcache import policies
from atom_jax.kvcache.lasting.levels import Law
from atom_jax.models.transformer import TransformerConfig
from atom_jax.training.config import Experiment
from atom_jax.transfer import initialisers
from atom_jax.typing import AtomError

EXPERIMENT = Experiment(model=TransformerConfig())


def leaves(cfg, path=""):
    """(path, kind) of every int and float of a configuration and its parts."""
    for name, hint in config._hints(type(cfg)).items():
        value, where = getattr(cfg, name), f"{path}{name}"
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{where}.")
        elif hint in (int, float):
            yield where, hint


@pytest.mark.parametrize("cfg", [EXPERIMENT, EvalConfig()], ids=["experiment", "evaluation"])
def test_every_number_knows_its_range(cfg):
    fields = list(leaves(cfg))
    assert len(fields) > 20
    for path, kind in fields:
        bad = ["1e400", "nan", "1e40", "9" * 5000] if kind is float else ["1e400", "99999999999", "9" * 5000, "nan"]
        for text in bad:
            with pytest.raises(AtomError) as e:
                config.override(cfg, [f"{path}={text}"])
            assert path in str(e.value) and len(str(e.value)) < 300
        if kind is int:
            with pytest.raises(AtomError, match=r"expected a whole number from .* to .*, got"):
                config.override(cfg, [f"{path}=99999999999"])


@pytest.mark.parametrize("name", sorted(policies.POLICIES))
def test_numbers_of_policies(name):
    for field, hint in config._hints(policies.POLICIES[name]).items():
        for text in ("1e400", "nan") if hint in (int, float) else ():
            with pytest.raises(AtomError, match=f"{field}="):
                policies.parse(f"{name}:{field}={text}")


@pytest.mark.parametrize(
    "changes",
    [{"n_kv_heads": 0}, {"norm_eps": math.nan}, {"d_model": 2.5}, {"vocab_size": "a"}, {"rope_theta": math.inf}],
    ids=str,
)
def test_configurations_made_in_python(changes):
    with pytest.raises(AtomError, match=f"{next(iter(changes))}: expected a"):
        TransformerConfig(**changes)


@pytest.fixture(scope="module")
def llama(golden):
    return atom_jax.load(golden / "hf_tiny" / "llama")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 2.5}, r"max_new_tokens is 2\.5; expected a whole number from 1"),
        ({"max_new_tokens": 10**5000}, "max_new_tokens is a number of hundreds of digits"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"key": 0}, "key: expected a key such as"),
        ({"key": "k"}, "key: expected a key such as"),
        ({"stop_ids": 5}, "stop_ids: expected a list"),
        ({"stop_ids": ["a"]}, "token id of stop_ids is 'a'"),
        ({"stop_ids": [96]}, "expected a whole number from 0 to 95"),
        ({"stop": 5}, "stop: expected a list"),
        ({"stop": [5]}, "stop: expected a string or a list of strings"),
        ({"temperature": "hot"}, "temperature: expected a number"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": math.nan}, "top_k is nan"),
    ],
)
def test_arguments_of_generate(llama, options, message):
    with pytest.raises(AtomError, match=message):
        atom_jax.generate(llama, [[1, 2, 3]], **{"max_new_tokens": 2} | options)


@pytest.mark.parametrize(
    "ids, message",
    [
        ([[1] * 257], "a row of 257 tokens exceeds the 256 positions"),
        ([[96]], "outside the vocabulary of 96"),
        ([[1], [1, 2]], "rows of different lengths"),
        ([[10**30]], "ids must be integers"),
    ],
    ids=["long", "vocabulary", "ragged", "huge"],
)
def test_ids_of_apply(llama, ids, message):
    with pytest.raises(AtomError, match=message):
        atom_jax.apply(llama, ids)
    assert atom_jax.apply(llama, [[1] * 256]).logits.shape == (1, 256, 96)


def test_prompts(llama):
    for prompts in (5, [1, 2], [[1, [2]]], [[1.5]]):
        with pytest.raises(AtomError, match="prompts"):
            atom_jax.generate(llama, prompts, 1, key=jax.random.key(0))


def test_messages_stay_short():
    for text in ("x" * 10**6, "word " * 10**5, "a\nb\n" * 1000, f"--set {'y' * 400}={'z' * 400}: expected 1 to 3"):
        message = str(AtomError(text))
        assert len(message) < 300 and "\n" not in message and message[:4] == text[:4].replace("\n", " ")
    assert str(AtomError("short")) == "short"
    assert str(AtomError(f"--set {'y' * 4000}=1: expected 1 to 3")).endswith(": expected 1 to 3")


@pytest.mark.parametrize("text", ["def", "raise ValueError('no')", "VARIANTS = {'a': lambda: 1 / 0}", "VARIANTS = 5"])
def test_configuration_files_that_fail(tmp_path, text):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(AtomError, match="--config="):
        config.load_file(str(tmp_path / "c.py"))
    (tmp_path / "c.txt").write_text(text)
    with pytest.raises(AtomError, match=r"is not a \.py file"):
        config.load_file(str(tmp_path / "c.txt"))


@pytest.mark.parametrize("line", ['{"a":' * 20000, '{"prompt": []}', '{"prompt": "a", "answer": {}}', "{", "{}",
                                  '{"prompt": "a", "answer": true}'])  # fmt: skip
def test_lines_that_are_no_prompts(line):
    with pytest.raises(AtomError, match="--file, line 1"):
        chains.task_of_lines(line, "boxed", "--file")


def test_lines_with_answers_are_prompts():
    task = chains.task_of_lines('{"prompt": "a", "answer": "7"}\n{"prompt": "b", "answer": 8}', "boxed", "--file")
    assert task.prompts == ["a", "b"] and task.verify(1, " 8")


@pytest.mark.parametrize("flags", [("--prompt=a", "--puzzle=subset"), ("--problem=a 1 goal 1", "--answer=boxed")])
def test_flags_without_a_meaning_are_refused(flags, capsys):
    assert main(["atom_jax", "reason", "--checkpoint=nowhere", *flags]) == 1
    assert f"{flags[1].partition('=')[0]} has no meaning beside" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["convert", "nowhere", "OUT"],
        ["merge", "nowhere", "OUT"],
        ["adapter", "nowhere", "OUT"],
        ["instructify", "nowhere", "nowhere", "nowhere", "OUT"],
        ["transplant", "nowhere", "--tokenizer=nowhere", "--out=OUT"],
    ],
)
def test_directories_are_refused_before_the_work(args, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    for out, words in (("file/new", "cannot save there"), ("file", "already exists"), ("full", "already exists")):
        assert main(["atom_jax", *(arg.replace("OUT", str(tmp_path / out)) for arg in args)]) == 1
        err = capsys.readouterr().err
        assert f"{tmp_path / out}: {words}" in err and err.count("\n") == 1
    assert (tmp_path / "full" / "mine").read_text() == "x"


@pytest.mark.parametrize(
    "parse, text, words",
    [
        (facts.parse, "austen:size=0", "facts:austen: size: expected a whole number from 1"),
        (facts.parse, "austen:size=600", "facts:austen: size is 600: a gap of 1000 and facts=8 need"),
        (policies.parse, "tova:budget=0", "memory tova: expected budget"),
        (initialisers.parse, "omp:k=0", "method omp: k"),
        (Law.parse, "sqrt:entries=-1", "law"),
    ],
)
def test_values_that_do_not_fit_name_where_they_stand(parse, text, words):
    with pytest.raises(AtomError) as e:
        parse(text)
    assert str(e.value).startswith(words)


@pytest.mark.parametrize(
    "command, flag, other",
    [
        ("train", "topology=v5p:4x4x4", "compile_only"),
        ("train", "coordinator=host:1", "distributed"),
        ("train", "process_id=0", "coordinator"),
        ("train", "num_processes=2", "coordinator"),
        ("eval", "topology=v5e:2x2", "compile_only"),
        ("eval", "config=configs/lm.py:tiny", "compile_only"),
        ("generate", "question=x", "file"),
        ("generate", "choice=whole=3", "memory_dir"),
        ("generate", "neighbours=weight=0.1", "memory_dir"),
        ("generate", "remember", "memory_dir"),
        ("generate", "reread=1", "memory_dir"),
        ("generate", "draft_tokens=3", "draft"),
        ("generate", "rows=2", "compile_only"),
        ("generate", "length=9", "compile_only"),
        ("generate", "mesh=tensor=2", "compile_only"),
        ("units", "length=9", "episode"),
        ("units", "seed=9", "episode"),
        ("fairness", "prior=0.1", "scripts"),
        ("tokens", "allocate=gain", "tokens"),
    ],
)
def test_flags_of_another_one_are_refused_without_it(command, flag, other, capsys):
    assert (
        main(["atom_jax", command, "--checkpoint=nowhere" if command != "train" else "--workdir=x", f"--{flag}"]) == 1
    )
    assert f"--{flag.partition('=')[0]} has no meaning without --{other}\n" in capsys.readouterr().err
