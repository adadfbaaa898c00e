"""Flags that say nothing, say it twice, or say what nobody asks: refused, by the name that was typed."""

import os
import socket

import pytest
from absl import flags

from atom_jax.__main__ import _commands, main
from atom_jax.commands.flags import Done, named
from atom_jax.typing import AtomError
from tests.reliability.test_commands import limited

# Those of which an empty text is a value.
EMPTY = {"prompt", "system", "text"}


def known(command):
    with pytest.raises(Done) as done:
        _commands()[command]([command, "--help"])
    return done.value.known


@pytest.mark.parametrize("command", [name for name in _commands() if name != "completion"])
def test_empty_flags_are_no_flags(command, capsys):
    for name in known(command)._lines:
        flag = known(command).values[name]
        if isinstance(flag.default, bool | int | float) or (name in EMPTY and command not in ("recall", "remember")):
            continue
        with pytest.raises((AtomError, flags.Error), match=f"{name}"):
            known(command).parse([command, f"--{name}="], None)


def test_texts_that_name_nothing(capsys):
    for args, message in (
        (["eval", "--tasks=bpb,"], "--tasks has an empty value among others"),
        (["eval", "--tasks="], "--tasks is empty; leave it out, or give it a value"),
        (
            ["generate", "--checkpoint=reason-subset", "--prompt=a", "--adapter=,"],
            "--adapter: expected the name of one",
        ),
    ):
        assert main(["atom_jax", *args]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, message",
    [
        (["generate", "--compile_only", "--prompt=x"], "--prompt has no meaning beside --compile_only"),
        (["generate", "--compile_only", "--stats"], "--stats has no meaning beside --compile_only"),
        (["generate", "--top_p=0.9"], "--top_p has no meaning without --temperature"),
        (["chat", "--seed=3"], "--seed has no meaning without --temperature"),
        (["eval", "--compile_only", "--out=x"], "--out has no meaning beside --compile_only"),
        (["eval", "--checkpoint=x", "--tasks=bpb", "--set", "max_length=9", "lambada.limit=3"],
         "--set lambada.limit=3: has no meaning without lambada among --tasks"),
        (["train", "--compile_only", "--workdir=x"], "--workdir has no meaning beside --compile_only"),
        (["fairness", "--scripts=latin", "--limit=3"], "--limit has no meaning beside --scripts"),
        (["units", "--episode=watch", "--color=never"], "--color has no meaning beside --episode"),
        (["reason", "--checkpoint=x", "--problem=x", "--json", "--show"], "--show has no meaning beside --json"),
        (["remember", "--checkpoint=x", "--memory_dir=x", "--parts=knn", "--law=log", "x"],
         "--law has no meaning with --parts=knn"),
        (["transplant", "x", "--tokenizer=bytes", "--out=OUT", "--bytes=0", "--judged=x"],
         "--judged has no meaning beside --bytes=0"),
        (["transplant", "x", "--tokenizer=bytes", "--out=OUT", "--donor=x"],
         "--donor has no meaning with --method=fvt and --fallback=normal; it is for omp, neighbours, landmarks"),
        (["transplant", "x", "--tokenizer=bytes", "--out=OUT", "--text=x"],
         "--text has no meaning with --method=fvt and --fallback=normal; it is for focus"),
        (["transplant", "x", "--tokenizer=bytes", "--out=OUT", "--method=omp"], "--method=omp: needs --donor"),
        (["transplant", "x", "--tokenizer=bytes", "--out=OUT", "--method=hypernet"], "needs a network"),
        (["transplant", "x", "--tokenizer=bytes", "--out=OUT", "--method=wechsel"], "which only Python can give it"),
        (["transplant", "x", "--tokenizer=bytes", "--out=OUT", "--special=a=b", "--special=a=c"], "given twice"),
        (["transplants", "x", "--tokenizer=bytes", "--out=OUT", "--method=omp"], "--method=omp: needs --donor"),
        (["transplants", "x", "--tokenizer=bytes", "--out=OUT", "--method=fvt", "--donor=bytes=x"],
         "--donor has no meaning with --method=fvt"),
    ],
)  # fmt: skip
def test_what_has_no_use_is_refused(args, message, tmp_path, capsys):
    out = tmp_path / "new"
    assert main(["atom_jax", *(arg.replace("OUT", str(out)) for arg in args)]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "argv, message, said",
    [
        (["--facts=5000"], "facts: expected a whole number", "--facts: expected a whole number"),
        (["--temperature", "-1"], "temperature is -1.0; expected 0 or more", "--temperature is -1.0; expected"),
        (["--stop=x"], "stop=x: expected none", "--stop=x: expected none"),
        (["--memory=x"], "memory 'x': expected", "--memory 'x': expected"),
        (["--tokens=5"], "facts: expected", "facts: expected"),
        (["facts"], "facts: expected", "facts: expected"),
        (["--facts=3"], "facts.txt: is empty", "facts.txt: is empty"),
        (["--facts=3", "facts"], "facts: is empty", "facts: is empty"),
        (["--a=3"], "a: expected", "--a: expected"),
    ],
)
def test_settings_are_named_as_they_were_typed(argv, message, said):
    with pytest.raises(AtomError) as e, named(argv):
        raise AtomError(message)
    assert str(e.value).startswith(said)


def test_what_the_environment_refuses_comes_before_a_model(tmp_path, capsys):
    (tmp_path / "empty").write_text(" \n")
    os.mkfifo(tmp_path / "pipe.json")
    lines = tmp_path / "lines"
    lines.write_text('{"prompt": "x", "anwser": "3"}\n')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            (["serve", f"--port={port}"], f"--port={port}: Address already in use"),
            (["serve", "--host=" + "x" * 99 + ".y"], "no name of a machine"),
            (["chat", f"--file={tmp_path}/empty"], "the document is empty"),
            (["generate", "--prompt=x", f"--memory={tmp_path}/pipe.json"], "it is a pipe or a device"),
            (["reason", f"--file={lines}"], "lines, line 1: unknown field 'anwser' (did you mean answer?)"),
        ]
        for args, message in cases:
            with limited():
                assert main(["atom_jax", args[0], "--checkpoint=nowhere", *args[1:]]) == 1
            err = capsys.readouterr().err
            assert message in err and err.count("\n") == 1, (args, err)


@pytest.mark.parametrize("place", ["file", "file/inside", "other"])
def test_a_memory_has_a_place_before_a_model_is_loaded(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("x")
    assert main(["atom_jax", "remember", "--checkpoint=nowhere", f"--memory_dir={place}", "file"]) == 1
    assert f"--memory_dir={place}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["fit_memory", "--checkpoint=nowhere", "OUT", "emma"],
        ["fairness", "--checkpoint=nowhere", "OUT"],
        ["plan", "--checkpoint=nowhere", "OUT"],
    ],
)
def test_files_of_another_kind_are_not_replaced(args, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.write_text("a novel")
    assert main(["atom_jax", *(arg.replace("OUT", f"--out={mine}") for arg in args)]) == 1
    assert f"--out={mine}: there is a file of another kind" in capsys.readouterr().err
    assert mine.read_text() == "a novel"


def test_texts_are_looked_at_before_a_model_is_loaded(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text").write_text(folder)
    (tmp_path / "empty").write_text("")
    there, memory = tmp_path / "a" / "text", f"--memory_dir={tmp_path}/new"
    for files, message in (
        ([there, tmp_path / "b" / "text"], "has the name of"), ([there, tmp_path / "empty"], "empty: is empty")
    ):  # fmt: skip
        assert main(["atom_jax", "remember", "--checkpoint=nowhere", memory, *map(str, files)]) == 1
        assert message in capsys.readouterr().err
    fit = ["fit_memory", "--checkpoint=nowhere", f"--out={tmp_path}/new", str(there), f"{tmp_path}/missing"]
    assert main(["atom_jax", *fit]) == 1
    assert "missing: cannot be read" in capsys.readouterr().err
    assert main(["atom_jax", *fit[:-1], f"--policy_out={there}/inside"]) == 1
    assert f"{there}/inside: cannot save there" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
