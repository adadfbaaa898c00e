"""Mutants of memories on disk, scores, LoRA, templates, conversations, tables and images, as test_fuzz has them."""

import json
import pathlib
import shutil
import tempfile

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load

import atom_jax
from atom_jax import checkpoint, params
from atom_jax.checkpoint import peft
from atom_jax.checkpoint.safetensors_io import write_file
from atom_jax.data import conversations, images
from atom_jax.data.sources import open_source
from atom_jax.evaluation.reports import chains
from atom_jax.evaluation.tasks import lasting_fit
from atom_jax.kvcache.lasting.score import Linear, Moments
from atom_jax.lasting import learned, loading
from atom_jax.lasting.memory import Memory
from atom_jax.lasting.reader import Reader
from atom_jax.models import transformer
from atom_jax.tokenizers import ByteTokenizer, chat_template
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.typing import LM
from tests.checkpoint.test_peft import tuned, without
from tests.reliability.mutants import damaged, json_mutants
from tests.reliability.test_fuzz import fuzz, header_mutants, small_tokenizer
from tests.tokenizers.test_chat_template import CHATML

CFG = transformer.TransformerConfig(
    d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, max_length=512, eos_ids=(257,)
)
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(scope="module")
def lm():
    return LM(CFG, params.init(jax.random.key(3), transformer.spec(CFG)), ByteTokenizer())


@pytest.fixture(scope="module")
def remembered(lm, tmp_path_factory):
    """A memory of one text and of half of another, with entries in blocks, waiting and in the window."""
    home = tmp_path_factory.mktemp("memories") / "memory"
    how = {"law": "sqrt:entries=8,block=16", "part": 16, "codec": "int8", "parts": ["levels", "knn"]}
    with Memory.open(home, lm, **how) as memory:
        memory.read("It was a truth universally acknowledged. " * 4, "one")
        memory.read("Another text with other words. " * 2, "two")
    return home


@pytest.fixture
def memory(remembered, tmp_path):
    shutil.copytree(remembered, tmp_path / "memory")
    return tmp_path / "memory"


def tensor_mutants(raw, rng):
    """A safetensors file that says of itself what it holds, with a tensor of another shape, type, name or value."""
    if not rng.randrange(3):
        return header_mutants(raw, rng)
    arrays = dict(load(raw))
    name = rng.choice(sorted(arrays))
    x = arrays.pop(name)
    match rng.randrange(7):
        case 0:
            pass
        case 1:
            arrays[f"{name}_"] = x
        case 2:
            arrays[name] = x.astype(rng.choice([np.float64, np.float16, np.int32, np.uint8, np.int64, bool]))
        case 3:
            arrays[name] = x.reshape(-1) if rng.randrange(2) else x[None]
        case 4:
            arrays[name] = np.repeat(x, rng.randrange(3), axis=rng.randrange(x.ndim)) if x.ndim else x
        case 5:
            arrays[name] = x[..., : rng.randrange(4)] if x.ndim else x
        case _:
            big = (
                np.finfo(x.dtype).max if x.dtype.kind == "f" else np.iinfo(x.dtype).max if x.dtype.kind in "iu" else 1
            )
            arrays[name] = np.full_like(x, rng.choice([-1 if x.dtype.kind != "u" else 0, 0, big]))
            if x.dtype.kind == "f" and rng.randrange(2):
                arrays[name] = np.full_like(x, rng.choice([np.nan, np.inf, -np.inf]))
    with tempfile.TemporaryDirectory() as home:
        file = pathlib.Path(home) / "x"
        write_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, file)
        return file.read_bytes()


def looked_at(home, lm):
    """Everything that commands look at, apart from what a model computes with it."""
    found = Memory.open(home)
    found.stats()
    found.verify()
    store, manifest = found._store, found._manifest
    loading.front(store, manifest, lm)
    reader = Reader(lm, found.settings.part, found.settings.sinks)
    memory = Memory.open(home, lm)
    memory._resumed(reader)
    memory._learned()
    memory.mixing(lm.params)
    memory.recall(["truth"])
    memory.passages(np.arange(97, 110), 2)


def test_manifest_of_a_memory(memory, lm):
    fuzz(memory / "MEMORY.json", json_mutants, lambda: looked_at(memory, lm), least=1)


@pytest.mark.parametrize("kind", ["seg", "tail", "text", "state"])
def test_files_of_a_memory(memory, lm, kind):
    file = sorted(memory.glob(f"{kind}-*"))[0]
    fuzz(file, tensor_mutants, lambda: looked_at(memory, lm))


def test_score(tmp_path):
    one = np.ones(6, np.float32)
    learned.save(Linear(one, one, one, "f" * 16), tmp_path / "score.safetensors")
    fuzz(tmp_path / "score.safetensors", tensor_mutants, lambda: learned.load(tmp_path / "score.safetensors"))


def test_moments(tmp_path):
    x = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    file = tmp_path / "m.safetensors"
    lasting_fit._save(Moments.of(x, np.arange(40) % 5 == 0), file)
    fuzz(file, tensor_mutants, lambda: lasting_fit._load(file, 6))


@pytest.mark.parametrize("name", [peft.CONFIG, peft.TENSORS])
def test_lora(tmp_path, name):
    lm = tuned()
    atom_jax.save_adapter(lm, tmp_path / "lora")
    base = without(lm)

    def read():
        peft.about(tmp_path / "lora")
        checkpoint.adapters.load_adapter(base, tmp_path / "lora")

    fuzz(tmp_path / "lora" / name, json_mutants if name == peft.CONFIG else tensor_mutants, read)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_chat_template(tmp_path, name):
    (tmp_path / "tokenizer.json").write_text(small_tokenizer())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": CHATML}))
    if name == "chat_template.jinja":
        (tmp_path / name).write_text(CHATML)

    def read():
        tokenizer = JsonTokenizer(tmp_path)
        if chat_template.of(tokenizer) is not None:
            chat_template.written(tokenizer, TALK)
            chat_template.answers(tokenizer, TALK)

    fuzz(tmp_path / name, json_mutants if name.endswith("json") else damaged, read, least=1)


def lines_mutants(raw, rng):
    lines = raw.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json_mutants(lines[at], rng)
    return b"\n".join(lines) + b"\n"


class Chatting(ByteTokenizer):
    chat_template = CHATML


@pytest.mark.parametrize("end", ["jsonl", "json", "csv", "parquet"])
def test_conversations(tmp_path, end):
    path = tmp_path / f"talks.{end}"
    records = [{"messages": TALK}, {"messages": [{"role": "system", "content": "ä"}, *TALK]}] * 3
    told = [{"prompt": "a", "completion": f"b{i}"} for i in range(6)]
    if end == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif end == "json":
        path.write_text(json.dumps(records))
    elif end == "csv":
        path.write_text("prompt,completion\n" + "".join(f'{r["prompt"]},"{r["completion"]}"\n' for r in told))
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in [*records, *told]))

    def read():
        corpus = open_source(str(path), "all", chat=True)
        for i in range(len(corpus)):
            conversations.conversation_tokens({"text": corpus.read(i)}, Chatting())

    mutate = {"jsonl": lines_mutants, "json": json_mutants}.get(end, damaged)
    fuzz(path, mutate, read)


def test_prompts_of_chains(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "answer": i}) + "\n" for i in range(6)))

    def read():
        chains.task_of_lines(path.read_bytes().decode("utf-8", "replace"), "boxed", "--file")

    fuzz(path, lines_mutants, read, least=1)


@pytest.mark.parametrize("end", ["png", "gif", "bmp", "tiff", "webp", "jpeg", "ppm"])
def test_images(tmp_path, end):
    path = tmp_path / f"x.{end}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(path)
    fuzz(path, damaged, lambda: images.read(path, 8, 3))


def test_images_in_arrays(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, images=np.zeros((4, 8, 8, 3), np.uint8))

    def read():
        images.files._read.cache_clear()
        images.parse(str(path)).images()

    fuzz(path, damaged, read)
