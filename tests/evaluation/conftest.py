"""A tiny random model, and request files in the layouts of the real ones."""

import dataclasses
import gzip
import json

import jax
import pytest

from atom_jax import params
from atom_jax.data.fetch import evaldata
from atom_jax.models import transformer
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM

CONFIG = transformer.TransformerConfig(
    d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32, max_length=64
)


@pytest.fixture(scope="session")
def lm() -> LM:
    """Byte-level, with weights large enough that its predictions differ."""
    tree = params.init(jax.random.key(0), transformer.spec(CONFIG))
    tree["embed"] = tree["embed"] * 20
    return LM(CONFIG, tree, ByteTokenizer())


@pytest.fixture(scope="session")
def uniform(lm) -> LM:
    """Gives every token the same probability."""
    return dataclasses.replace(lm, params=jax.tree.map(lambda x: x * 0, lm.params))


def rows(documents, neutral=None):
    """Lines of a request file for [(contexts, continuations, gold)]; doubled if a neutral context is given."""
    out = []
    for offset in (0, 1_000_000)[: 1 if neutral is None else 2]:
        for number, (contexts, continuations, gold) in enumerate(documents):
            for i, (context, continuation) in enumerate(zip(contexts, continuations)):
                request = {"context": neutral if offset else context, "continuation": continuation}
                out.append({"doc_id": offset + number, "idx": i, "label": gold, "request": request})
    return out


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(file, rows, layout): a request file that `requests.read(file)` finds."""
    monkeypatch.setenv("ATOM_EVALDATA", str(tmp_path))

    def _write(file, lines, layout):
        path = tmp_path / f"{file}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt") as f:
            f.writelines(json.dumps(line) + "\n" for line in lines)
        monkeypatch.setitem(evaldata.FILES, file, layout)
        return path

    return _write
