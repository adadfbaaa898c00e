"""The commands of python -m atom_jax, run in this process."""

import json

import jax
import pytest

import atom_jax
from atom_jax import params
from atom_jax.__main__ import main
from atom_jax.inference import generate as generate_module
from atom_jax.models import transformer
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


def test_convert_and_info(run, checkpoint, tmp_path):
    code, out, _ = run("convert", checkpoint, str(tmp_path / "orbax"))
    assert code == 0 and "llama" in out
    code, out, _ = run("info", str(tmp_path / "orbax"))
    assert code == 0 and "llama" in out and "tokenizer" in out
    code, out, _ = run("info", checkpoint, "--tensors")
    assert code == 0 and "model.embed_tokens.weight" in out


@pytest.mark.parametrize(
    "args, words",
    [
        (["fly"], "unknown command 'fly'; known: generate, convert, info"),
        (["generate", "--prompt=x"], "--checkpoint is missing"),
        (["generate", "--checkpoint=CHECKPOINT"], "--prompt is missing"),
        (["generate", "--checkpoint=nowhere", "--prompt=x"], "nowhere"),
        (["generate", "--colour=red"], "colour"),
        (["generate", "--top_k=many"], "top_k"),
        (["generate", "--checkpoint=CHECKPOINT", "--prompt=x", "extra"], "extra"),
        (["generate", "--checkpoint=CHECKPOINT", "--prompt=x", "--max_new_tokens=0"], "max_new_tokens is 0"),
        (["generate", "--checkpoint=CHECKPOINT", "--prompt=x", "--max_new_tokens=511"], "exceed the 512"),
        (["generate", "--checkpoint=CHECKPOINT", "--prompt=x", "--top_p=2"], "top_p"),
        (["generate", "--checkpoint=CHECKPOINT", "--prompt=x", "--dtype=int8"], "int8"),
        (["convert", "one"], "SRC DST"),
        (["convert", "CHECKPOINT", "CHECKPOINT"], "already exists"),
        (["info"], "PATH"),
        (["info", "nowhere"], "nowhere"),
        (["fairness"], "--checkpoint is missing"),
        (["fairness", "--checkpoint=CHECKPOINT", "--source=nowhere"], "no directory there has a test split"),
        (["fairness", "--checkpoint=CHECKPOINT", "--limit=-1"], "--limit=-1"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_one(run, checkpoint, args, words):
    code, out, err = run(*(a.replace("CHECKPOINT", checkpoint) for a in args))
    assert code == 1 and out == ""
    assert words in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["convert", "--help"], ["info", "-h"]])
def test_help_names_what_there_is(run, args):
    code, out, err = run(*args)
    assert code == 0 and err == ""
    assert "python -m atom_jax" in out
    if args[0] == "generate":
        assert all(f"--{name}" in out for name in ("checkpoint", "prompt", "max_new_tokens", "temperature", "stop"))


def test_no_command_shows_the_usage(run):
    code, out, _ = run()
    assert code == 1 and "generate" in out


def test_ctrl_c_ends_quietly(run, checkpoint, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_module, "generate", interrupted)
    code, _, err = run("generate", f"--checkpoint={checkpoint}", "--prompt=x")
    assert code == 130 and err == "\n"
