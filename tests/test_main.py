"""The commands of python -m atom_jax, run in this process."""

import io
import json
import subprocess
import sys

import jax
import pytest

import atom_jax
from atom_jax import params
from atom_jax.__main__ import main
from atom_jax.evaluation.reports import units
from atom_jax.inference import generate as generate_module
from atom_jax.models import hnet, transformer
from atom_jax.models.hnet import chunking
from atom_jax.session import reading
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    cfg = transformer.TransformerConfig(
        d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=48, max_length=512, eos_ids=(257,)
    )
    lm = LM(cfg, params.init(jax.random.key(3), transformer.spec(cfg)), ByteTokenizer())
    path = tmp_path_factory.mktemp("model") / "hf"
    atom_jax.save_hf(lm, path)
    return str(path)


@pytest.fixture(scope="module")
def units_checkpoint(tmp_path_factory):
    cfg = hnet.HNetConfig(
        vocab_size=264, layout=("T1", "T1", "T1"), d_model=(16, 16), d_intermediate=(16, 16), n_heads=(2, 2),
        rotary_dim=(8, 8), window=(15, -1), chunking=(chunking(4.0, 0.5),), bos_id=256, eos_ids=(257,), pad_id=258,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("units") / "hf"
    atom_jax.save_hf(LM(cfg, params.init(jax.random.key(3), hnet.spec(cfg)), ByteTokenizer()), path)
    return str(path)


@pytest.fixture
def run(capsys):
    def call(*args):
        code = main(["atom_jax", *args])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_generate_streams_the_text_and_ends_with_the_rate(run, checkpoint):
    flags = [f"--checkpoint={checkpoint}", "--prompt=abc", "--temperature=1", "--seed=5", "--max_new_tokens=20"]
    code, out, err = run("generate", *flags)
    key = jax.random.key(5)
    expected = atom_jax.generate(atom_jax.load(checkpoint), ["abc"], 20, 1.0, key)
    assert code == 0 and out == expected.text[0] + "\n"
    assert "tokens/s" in err and "kv_bytes" not in err
    code, out, err = run("generate", *flags, "--stats", "--json")
    result = json.loads(out)
    assert code == 0 and result["text"] == expected.text and result["ids"] == expected.ids
    assert result["stats"]["new_tokens"] == len(expected.ids[0]) and "kv_bytes" in err


def test_generate_takes_several_prompts_and_stops(run, checkpoint):
    flags = [f"--checkpoint={checkpoint}", "--prompt=abc", "--prompt=", "--temperature=1", "--max_new_tokens=20"]
    code, out, _ = run("generate", *flags, "--json")
    whole = json.loads(out)["text"]
    stop = next(c for c in whole[0][3:] if c < "\x80")
    code, out, _ = run("generate", *flags, f"--stop={stop}")
    assert code == 0 and out == f"--- abc\n{whole[0].split(stop)[0]}\n--- \n{whole[1].split(stop)[0]}\n"
    code, out, _ = run("generate", *flags, "--json", "--draft=ngram", "--draft_tokens=3")
    assert code == 0 and json.loads(out)["text"] == whole
    assert json.loads(out)["stats"]["tokens_per_call"] >= 1


def test_documents_are_read_once(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PART", 64)
    (tmp_path / "doc").write_text("words of a document " * 9)
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc"))
    flags = [f"--checkpoint={checkpoint}", f"--file={tmp_path / 'doc'}", "--prompt=-", "--prompt=x", "--json"]
    code, out, err = run("generate", *flags, "--max_new_tokens=6")
    lm, text = atom_jax.load(checkpoint), (tmp_path / "doc").read_text() + "\n\n"
    wanted = [atom_jax.generate(lm, [text + end], 6).ids[0] for end in ("abc", "x")]
    assert code == 0 and json.loads(out)["ids"] == wanted and "reading: 100%" in err
    code, out, _ = run("generate", *[f for f in flags if f not in ("--prompt=-", "--json")], "--max_new_tokens=6")
    assert code == 0 and out == lm.tokenizer.decode(wanted[1]) + "\n"


def test_convert_and_info(run, checkpoint, tmp_path):
    code, out, _ = run("convert", checkpoint, str(tmp_path / "orbax"))
    assert code == 0 and "llama" in out
    code, out, _ = run("info", str(tmp_path / "orbax"))
    assert code == 0 and "llama" in out and "tokenizer" in out
    code, out, _ = run("info", checkpoint, "--tensors")
    assert code == 0 and "model.embed_tokens.weight" in out
    code, out, _ = run("info", checkpoint, "--tensors", "--json")
    table = json.loads(out)
    assert code == 0 and table["family"] == "llama" and table["tensors"][0]["name"] == "model.embed_tokens.weight"


def test_units_in_brackets_in_colour_and_in_a_picture(run, units_checkpoint, tmp_path):
    text, picture = "It was a truth\nof sorts.", tmp_path / "units.png"
    code, out, err = run("units", f"--checkpoint={units_checkpoint}", f"--text={text}", f"--out={picture}")
    assert code == 0 and err == "" and out.startswith("Units of stage 0, made of bytes\n[It")
    shown = out.split("\n  ")[0].split("\n", 1)[1]
    assert shown.replace("\n", "").replace("[", "").replace("]", "").replace("⏎", "\n") == text
    assert picture.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "text").write_text(text)
    flags = [f"--checkpoint={units_checkpoint}", f"--file={tmp_path / 'text'}"]
    assert run("units", *flags) == (0, out, "")
    code, colors, _ = run("units", *flags, "--color=always")
    assert code == 0 and colors.count("\x1b[0m") == shown.count("[")


def test_units_of_long_texts_say_how_they_were_read(run, units_checkpoint, monkeypatch):
    monkeypatch.setattr(units, "_LONGEST", 32)
    code, out, err = run("units", f"--checkpoint={units_checkpoint}", "--text=" + "It was a truth. " * 4)
    assert code == 0 and out.startswith("Units of stage 0")
    assert err == "read in 3 windows of 32 tokens, with 15 or more before each\n"


def test_units_of_a_model_without_its_own_are_tokens(run, checkpoint):
    code, out, _ = run("units", f"--checkpoint={checkpoint}", "--text=abc")
    assert code == 0 and out.splitlines()[1] == "[a][b][c]"


@pytest.mark.parametrize(
    "args, words",
    [
        (["fly"], "unknown command 'fly'; known: train, eval, generate, "),
        (["generat"], "unknown command 'generat' (did you mean generate?); known: "),
        (["generate", "--chekpoint=x"], "Unknown command line flag 'chekpoint'. Did you mean: checkpoint ?"),
        (["train"], "--config is missing"),
        (["train", "--config=configs/lm.py:tiny", "--workdir=x", "words"], "unexpected argument 'words'"),
        (["train", "--config=configs/llm.py", "--workdir=x"], "come along: configs/bolmo.py, "),
        (["eval", "--checkpoint=CHECKPOINT"], "--tasks is missing: the tasks are bpb, lambada"),
        (["generate", "--prompt=x"], "--checkpoint is missing"),
        (["generate", "--checkpoint=CHECKPOINT"], "--prompt is missing"),
        (["generate", "--checkpoint=nowhere", "--prompt=x"], "nowhere"),
        (["generate", "--checkpoint=CHECKPOINT", "--adapter=nothing", "--prompt=x"], "adapter 'nothing' is neither"),
        (["generate", "--colour=red"], "colour"),
        (["generate", "--checkpoint=CHECKPOINT", "--question=x"], "--question has no meaning without --file"),
        (["generate", "--checkpoint=CHECKPOINT", "--file=x"], "--question or --prompt is missing"),
        (["generate", "--checkpoint=CHECKPOINT", "--file=nowhere", "--prompt=x"], "--file=nowhere: No such file"),
        (["generate", "--checkpoint=CHECKPOINT", "--file=/dev/null", "--prompt=x"], "--file=/dev/null"),
        (["generate", "--checkpoint=CHECKPOINT", "--file=LICENSE", "--prompt=x"], "positions, the model has 512"),
        (["generate", "--checkpoint=CHECKPOINT", "--file=LICENSE", "--question=x"], "no chat template"),
        (["generate", "--checkpoint=CHECKPOINT", "--prompt=-", "--prompt=-"], "--prompt=- was given twice"),
        (["generate", "--top_k=many"], "top_k"),
        (["generate", "--checkpoint=CHECKPOINT", "--prompt=x", "extra"], "extra"),
        (["generate", "--checkpoint=CHECKPOINT", "--prompt=x", "--max_new_tokens=0"], "max_new_tokens is 0"),
        (["generate", "--checkpoint=CHECKPOINT", "--prompt=x", "--max_new_tokens=511"], "exceed the 512"),
        (["generate", "--checkpoint=CHECKPOINT", "--prompt=x", "--top_p=2"], "top_p"),
        (["generate", "--checkpoint=CHECKPOINT", "--prompt=x", "--dtype=int8"], "int8"),
        (["generate", "--checkpoint=CHECKPOINT", "--prompt=x", "--draft=oracle"], "draft 'oracle': expected none"),
        (
            ["generate", "--checkpoint=CHECKPOINT", "--prompt=x", "--draft=local"],
            "--draft=local: is for models with un",
        ),
        (
            ["generate", "--checkpoint=CHECKPOINT", "--prompt=x", "--draft=ngram", "--draft_tokens=65"],
            "draft_tokens is 65",
        ),
        (["units", "--text=x"], "--checkpoint is missing"),
        (["units", "--checkpoint=CHECKPOINT"], "--text or --file is missing"),
        (["units", "--checkpoint=CHECKPOINT", "--text=x", "--file=y"], "--text and --file were given"),
        (["units", "--checkpoint=CHECKPOINT", "--file=nowhere"], "--file=nowhere: No such file"),
        (["units", "--checkpoint=CHECKPOINT", "--text="], "the text is empty"),
        (["units", "--checkpoint=CHECKPOINT", "--text=x", "--color=red"], "--color=red: expected auto"),
        (["units", "--checkpoint=CHECKPOINT", "--text=x", "--out=a.jpg"], "a.jpg: the picture is a PNG file"),
        (
            ["units", "--checkpoint=CHECKPOINT", "--text=x", "--out=nowhere/a.png"],
            "nowhere/a.png: the picture cannot",
        ),
        (["units", "--checkpoint=nowhere", "--text=x"], "nowhere"),
        (["convert", "one"], "SRC DST"),
        (["convert", "CHECKPOINT", "CHECKPOINT"], "already exists"),
        (["info"], "PATH"),
        (["info", "nowhere"], "nowhere"),
        (["completion", "csh"], "no shell 'csh'; known: bash, "),
        (["fairness"], "--checkpoint is missing"),
        (["fairness", "--checkpoint=CHECKPOINT", "--source=nowhere"], "no directory there has a test split"),
        (["fairness", "--checkpoint=CHECKPOINT", "--limit=-1"], "--limit=-1"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_one(run, checkpoint, args, words):
    code, out, err = run(*(a.replace("CHECKPOINT", checkpoint) for a in args))
    assert code == 1 and out == ""
    assert words in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("args", [["generate", "--prompt=x"], ["chat"], ["reason"]])
def test_files_that_are_no_text(run, checkpoint, args, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(b"caf\xc3\xa9 \xff")
    code, out, err = run(*args, f"--checkpoint={checkpoint}", f"--file={path}")
    assert (code, out, err) == (1, "", f"error: --file={path}: not valid UTF-8 at byte 6\n")


def test_input_that_is_no_text(run, checkpoint, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), "utf-8"))
    code, out, err = run("generate", f"--checkpoint={checkpoint}", "--prompt=-")
    assert code == 1 and out == "" and err.startswith("error: the input is not valid UTF-8") and err.count("\n") == 1


@pytest.mark.parametrize(
    "args", [["--help"], ["generate", "--help"], ["convert", "--help"], ["info", "-h"], ["units", "-h"]]
)
def test_help_names_what_there_is(run, args):
    code, out, err = run(*args)
    assert code == 0 and err == ""
    assert "python -m atom_jax" in out
    assert run("--version") == (0, f"{atom_jax.__version__}\n", "")
    if args[0] == "generate":
        assert run("help", "generate") == (0, out, "")
        assert all(f"--{name}" in out for name in ("checkpoint", "prompt", "max_new_tokens", "temperature", "stop"))


def test_help_is_as_wide_as_the_terminal(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    _, out, _ = run("generate", "--help")
    assert max(map(len, out.splitlines())) <= 70
    assert "--temperature     0 always takes the most likely token (default 0.0)\n" in out


def test_bash_completes_commands_flags_and_files(run, tmp_path):
    code, script, err = run("completion", "bash")
    assert code == 0 and err == ""
    (tmp_path / "models").mkdir()
    body = """of() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_atom_jax 2>/dev/null; echo ${COMPREPLY[@]}; }
        of atom-jax gener
        of atom-jax complet
        of atom-jax chat --check
        of atom-jax chat --checkpoint = mod
        of atom-jax merge mod"""
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{body}"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n") == ["generate", "completion", "--checkpoint", "models", "models", ""]
    assert all(run("completion", shell)[0] == 0 for shell in ("zsh", "fish"))


def test_no_command_shows_the_usage(run):
    code, out, _ = run()
    assert code == 1 and "generate" in out


def test_ctrl_c_ends_quietly(run, checkpoint, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_module, "generate", interrupted)
    code, _, err = run("generate", f"--checkpoint={checkpoint}", "--prompt=x")
    assert code == 130 and err == "\n"
