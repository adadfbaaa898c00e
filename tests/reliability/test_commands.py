"""Every command with everything that could be put in the place of its arguments: sentences, never a traceback."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import traceback

import jax
import pytest

import atom_jax
from atom_jax import params
from atom_jax.__main__ import main
from atom_jax.models import hnet
from atom_jax.models.hnet.examples import examples
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM
from tests import quick

ROOT = pathlib.Path(__file__).resolve().parents[2]
NUMBERS = ["", "x", "nan", "inf", "-1", "0", "1e400", "9" * 400, "1.5", "1,2", "0x10", "²"]
WORDS = ["", "x", "x" * 5000, "a\nb", "../..", "\udcff", "=", ":", ";", "1=2", "-", "ä漢"]
MEMORIES = [
    *WORDS, "none", "tova", "tova:", "tova:budget", "tova:budget=", "tova:budget=-1", "tova:budget=x", "tova:x=1",
    "tova:budget=1e400", "tova:ratio=2", "tova:budget=4;x=none", "tova:budget=4;99=none", "dms", "quest:ratio=nan",
    "snapkv:budget=8,window=0", "nowhere.json", "sepllm:budget=4", "razor_attention:budget=4",
]  # fmt: skip
SETTINGS = [
    "", "x", "=", "x=", "=1", "a.b.c=1", "mesh=1", "mesh.data=x", "bpb=1", "max_length=-1", "max_length=1e400",
    "kv.budgets=0", "kv.budgets=", "kv.policies=tova:x=1", "bpb.sources=", "front=x",
    "train.steps=nan", "train.steps=0", "model=1", "model.d_model=7", "data.sources=nowhere", "data.sources=",
    "optim.groups=x", "memory=tova", "tokenizer=nowhere", "init_from=nowhere", "seed=-1", "first=1", "fit.windows=2",
]  # fmt: skip
UNKNOWN = [
    "--nope",
    "--nope=1",
    "-z",
    "--",
    "---",
    "--=",
    "--checkpoint",
    "--no_checkpoint",
    "extra",
    "",
    "--flagfile=x",
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Paths by what is there."""
    home = tmp_path_factory.mktemp("places")
    cfg = examples()["hnet"]
    atom_jax.save_hf(LM(cfg, params.init(jax.random.key(3), hnet.spec(cfg)), ByteTokenizer()), home / "model")
    (home / "empty").write_bytes(b"")
    (home / "binary").write_bytes(bytes(range(256)))
    (home / "text").write_text("It was a truth.\n")
    (home / "weights.gguf").write_bytes(b"GGUF" + bytes(60))
    (home / "pickle.bin").write_bytes(b"\x80\x04K\x01.")
    (home / "directory").mkdir()
    os.mkfifo(home / "pipe")
    (home / "loop").symlink_to(home / "loop")
    (home / "run").mkdir()
    (home / "run" / "metrics.jsonl").write_text("{}\n[")
    (home / "run" / "checkpoints").mkdir()
    return home


def paths(home):
    """What is no checkpoint, text or place to write to."""
    there = [str(path) for path in sorted(home.iterdir()) if path.name != "model"]
    inside = [f"{home}/text/inside", f"{home}/nowhere", "/dev/zero", "/dev/null", "/dev/full", "/proc/1/mem"]
    return [*there, *inside, *WORDS]


def outputs(home):
    """Where nothing can be written."""
    bad = [
        f"{home}/text/x.png",
        f"{home}/pipe",
        "/proc/x.json",
        "/dev/full",
        str(home / "directory"),
        "x" * 5000,
    ]
    return [*bad, f"{home}/nowhere/x.png", f"{home}/text/x.json", ""]


def commands(home):
    """Arguments of `python -m atom_jax`, of which something is wrong."""
    model, bad = f"{home}/model", paths(home)
    good = f"--checkpoint={model}"
    named = (
        "generate", "serve", "units", "memory", "convert", "merge", "instructify", "info", "summary", "fairness",
        "imagine", "plan",
    )  # fmt: skip
    for name in (*named, "fly", ""):
        yield from ([name, flag] for flag in UNKNOWN)
    for path in bad:
        yield ["info", path]
        yield ["info", "--verify", path]
        yield ["convert", path, f"{home}/converted"]
        yield ["merge", path, f"{home}/made"]
        yield ["merge", model, f"{home}/made", f"--adapter={path}, "]
        yield ["adapter", path, f"{home}/made"]
        yield ["generate", good, "--prompt=x", f"--file={path}", "--max_new_tokens=0"]
        yield ["summary", path]
        yield ["instructify", path, model, model, f"{home}/made"]
        yield ["instructify", model, path, model, f"{home}/made"]
        for name in ("generate", "units", "memory", "fairness"):
            yield [name, f"--checkpoint={path}", *(["--prompt=x"] if name == "generate" else ["--text=x"])][:3]
        yield ["serve", f"--checkpoint={path}"]
        yield ["units", good, f"--file={path}"]
        yield ["memory", good, f"--file={path}"]
        yield ["generate", good, "--prompt=x", f"--adapter={path}"]
        yield ["fairness", good, f"--source={path}"]
        yield ["generate", "--compile_only", f"--config={path}"]
        yield ["generate", "--compile_only", good, f"--topology={path}"]
    for path in outputs(home):
        yield ["convert", model, path]
        yield ["adapter", model, path]
        yield ["units", good, "--text=x", f"--out={path}"]
        yield ["memory", good, "--text=x", f"--out={path}"]
        yield ["instructify", model, model, model, path]
    for text in MEMORIES:
        yield ["generate", good, "--prompt=x", f"--memory={text}", "--max_new_tokens=0"]
        yield ["serve", good, f"--memory={text}", "--rows=0"]
        yield ["plan", good, f"--memory={text}"]
    for number in NUMBERS:
        flags = ("temperature", "top_k", "top_p", "min_p", "seed")
        yield from (["generate", good, "--prompt=x", f"--{flag}={number}", "--max_new_tokens=511"] for flag in flags)
        yield ["generate", good, "--prompt=x", f"--max_new_tokens={number}", "--top_p=7"]
        flags = ("port", "rows", "length", "waiting", "grace", "cache_memory", "max_body")
        yield from (["serve", good, f"--{flag}={number}", "--memory=nowhere.json"] for flag in flags)
        yield ["memory", good, "--text=x", f"--tokens={number}", f"--out={home}/text/x.png"]
        yield from (["plan", good, f"--{flag}={number}"] for flag in ("episodes", "length", "seed"))
        yield from (["imagine", good, f"--{flag}={number}"] for flag in ("actions", "futures", "length"))
        yield ["fairness", good, f"--limit={number}", f"--source={home}/nowhere"]
        yield ["fairness", f"--prior={number}", "--scripts=latin", f"--source={home}/nowhere"]
        yield ["summary", str(home / "run"), f"--sample_tokens={number}"]
        yield ["instructify", model, model, model, f"{home}/text", f"--alpha={number}"]
    for word in WORDS:
        yield ["convert", model, f"{home}/text", f"--to={word}"]
        yield ["generate", good, f"--prompt={word}", "--max_new_tokens=0"]
        yield ["generate", good, "--prompt=x", f"--dtype={word}"]
        yield ["generate", good, "--prompt=x", "--compile_only", f"--mesh={word}"]
        yield ["fairness", f"--scripts={word}", f"--source={home}/nowhere"]
        yield ["units", good, "--text=x", f"--color={word}"]
        yield from (["plan", good, f"--{flag}={word}"] for flag in ("env", "planner"))
        yield ["units", good, f"--episode={word}"]


@contextlib.contextmanager
def limited(seconds=60):
    """TimeoutError for what waits for the other end of a pipe."""

    def end(*_):
        raise TimeoutError("still waiting")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(args, code, err):
    """What is wrong with how a command ended, or None."""
    shown = [arg if len(arg) < 200 else f"{arg[:20]}... ({len(arg)})" for arg in args]
    if type(code) is not int or "Traceback" in err:
        return f"{shown}: {code} {err[-900:]}"
    if code == 1 and not err.strip():
        return f"{shown}: failed without a word"
    longest = max(map(len, err.splitlines()), default=0)
    return f"{shown}: a line of {longest} characters" if longest > 320 else None


def test_python_m_atom_jax(places, capsys, monkeypatch):
    monkeypatch.chdir(places)
    cases, wrong = list(commands(places)), []
    for args in cases:
        try:
            with limited():
                code = main(["atom_jax", *args])
        except BaseException:
            code, error = None, traceback.format_exc()
        err = capsys.readouterr().err
        wrong += filter(None, [judge(args, code, error if code is None else err)])
    assert len(cases) > 600
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong[:20])


# Runs a script again and again in one process, each time with the arguments of a line of the input.
AGAIN = """
import contextlib, faulthandler, io, json, sys, traceback
from atom_jax.__main__ import script
for line in sys.stdin:
    args, err = json.loads(line), io.StringIO()
    faulthandler.dump_traceback_later(300, exit=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            code = script(sys.argv[1].removesuffix(".py"), [sys.argv[1], *args])
    except BaseException:
        code = None
        err.write(traceback.format_exc())
    print(json.dumps([args, code, err.getvalue()]), flush=True)
"""


def again(script, cases, home):
    """What is wrong with how the script ended, case by case."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:surrogatepass", "XLA_FLAGS": quick.FLAGS}
    done = subprocess.run(
        [sys.executable, "-c", AGAIN, script], input="".join(json.dumps(case) + "\n" for case in cases),
        capture_output=True, text=True, cwd=home, env=env, check=False,
    )  # fmt: skip
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    assert [args for args, _, _ in ended] == cases, f"{cases[len(ended)]}: {done.stderr[-900:]}"
    return [said for args, code, err in ended if (said := judge(args, code, err))]


def test_train(places):
    good, here = f"--config={ROOT}/configs/lm.py:tiny", f"--workdir={places}/text"
    cases = [[flag] for flag in UNKNOWN] + [[good, here, flag] for flag in UNKNOWN if flag != "--"]
    cases += [[f"--config={path}", here] for path in paths(places)]
    cases += [[f"--config={ROOT}/configs/lm.py:{word}", here] for word in WORDS if word]
    cases += [[good, here, f"--set={text}"] for text in SETTINGS]
    cases += [
        [good, f"--workdir={path}"] for path in outputs(places) if "directory" not in path and "nowhere" not in path
    ]
    cases += [[good, "--compile_only", f"--topology={word}"] for word in WORDS if word]
    cases += [[good, here, f"--process_id={number}"] for number in NUMBERS]
    wrong = again("train.py", cases, places)
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong[:20])


def test_eval(places):
    good, bpb = f"--checkpoint={places}/model", "--tasks=bpb"
    cases = [[flag] for flag in UNKNOWN] + [
        [good, bpb, f"--out={places}/pipe", flag] for flag in ("--nope", "x", "=")
    ]
    cases += [[f"--checkpoint={path}", bpb] for path in paths(places)]
    cases += [[good, f"--tasks={word}"] for word in WORDS]
    cases += [[good, "--tasks=x", f"--set={text}"] for text in SETTINGS]
    cases += [[good, bpb, f"--set={text}", f"--out={places}/text/x.json"] for text in SETTINGS]
    cases += [[good, bpb, f"--adapter={path}"] for path in paths(places) if path]
    cases += [[good, bpb, f"--out={path}", "--set=bpb.sources=nowhere"] for path in outputs(places)]
    cases += [["--compile_only", f"--config={path}"] for path in paths(places)]
    wrong = again("eval.py", cases, places)
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong[:20])
