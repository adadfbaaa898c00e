"""A model with another tokenizer learns from the one that it was made of."""

import contextlib
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import config, params
from atom_jax.aot.training import _Tokenizer
from atom_jax.data.pairs import PairedRows
from atom_jax.data.pipeline import make_iterator
from atom_jax.data.sources import open_source
from atom_jax.models import transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn import scoring
from atom_jax.tokenizers.byte_view import byte_view
from atom_jax.training import loop, start
from atom_jax.training.config import Experiment
from atom_jax.training.objectives import Alm
from atom_jax.training.objectives.base import Setting
from atom_jax.training.program import Program
from atom_jax.training.record import read
from atom_jax.transfer.alm import ALM
from atom_jax.typing import AtomError
from configs import transfer
from tests.training.tiny import mesh, sizes


@pytest.fixture(scope="module")
def student(source, tmp_path_factory):
    """The source with bytes for tokens."""
    made, _ = atom_jax.transplant(atom_jax.load(source), "bytes")
    path = tmp_path_factory.mktemp("student") / "model"
    atom_jax.save_hf(made, path)
    return path


def experiment(source, student, *settings):
    named = [f"objective.source={source}", f"init_from={student}"]
    return start.configure("configs/transfer.py:tiny", [*named, *settings])


def lines(workdir, kind):
    return [x for x in read(workdir / "metrics.jsonl") if x["kind"] == kind]


def test_rows_are_the_same_text_on_both_sides(source, student):
    exp = experiment(source, student, "data.shuffle=false")
    ours, theirs = atom_jax.load(student).tokenizer, atom_jax.load(source).tokenizer
    views = byte_view(ours), byte_view(theirs)
    kind = lambda *args: PairedRows(*args, other=theirs)  # noqa: E731
    with contextlib.closing(make_iterator(exp.data, ours, kind=kind)) as data:
        found = [next(data) for _ in range(2)]
    text = [b"".join(views[0].pieces.get(i, b"") for i in batch["ids"][0].tolist()) for batch in found]
    assert open_source("austen", "train").read(0).startswith(text[0] + text[1]) and min(map(len, text)) > 40
    for row in range(exp.data.batch_size):
        sides = [(found[0]["ids"], found[0]["chunks"]), (found[0]["tokens"], found[0]["token_chunks"])]
        parts = []
        for view, (ids, chunks) in zip(views, sides):
            real = chunks[row] >= 0
            assert (np.diff(chunks[row][real]) >= 0).all() and not real[real.sum() :].any()
            spelled = [view.pieces.get(i, b"") for i in ids[row][real].tolist()]
            parts.append([b"".join(s for s, c in zip(spelled, chunks[row]) if c == n) for n in range(chunks.max())])
        assert parts[0] == parts[1] and any(parts[0])


def test_what_is_held_out_gets_more_alike(source, student, tmp_path, curves, one_device):
    with curves():
        result = loop.fit(experiment(source, student), tmp_path)
    before, after = lines(tmp_path, "validation")
    assert after["alm"] < 0.97 * before["alm"] and result.step == 6
    assert before["source_bits_per_byte"] == after["source_bits_per_byte"] > 0
    assert (tmp_path / "plots" / "alm.png").exists()
    # The teacher is kept beside the model, as it was.
    assert (tmp_path / "checkpoints" / "6" / "source").is_dir()
    assert "source" not in atom_jax.load(tmp_path).params


def test_with_lora_the_layers_are_shared(source, student):
    exp = experiment(source, student, "mesh.data=1")
    exp = dataclasses.replace(exp, lora=transfer.alm_lora().lora)
    exp = dataclasses.replace(exp, model=dataclasses.replace(exp.model, lora=exp.lora))
    with pytest.raises(AtomError, match=r"layers/attn/\w must not learn"):
        exp.objective.check(exp)
    exp = dataclasses.replace(exp, optim=dataclasses.replace(exp.optim, groups=transfer.SHARED))
    exp.objective.check(exp)
    assert set(exp.objective.extra_spec(exp.model)["source"]) == {"embed"}
    with jax.set_mesh(mesh(exp.mesh)):
        setting = Setting(exp, mesh(exp.mesh), atom_jax.load(student).tokenizer)
        begun, _ = exp.objective.begin(setting, atom_jax.load(student).params, None, None)
        theirs, taught = exp.objective._teacher(begun | {"layers": begun["layers"] | {"lora": {}}}, exp.model)
        assert theirs.lora is None
        chex.assert_trees_all_equal(taught, atom_jax.load(source).params)
        ours = atom_jax.load(student).params
        other = params.init(jax.random.key(9), transformer.spec(atom_jax.load(student).config))
        for wrong in (other, ours | {"norm": ours["norm"] + 1}, ours | {"layers": {}}, None):
            with pytest.raises(AtomError, match="layers of init_from must be those of source"):
                exp.objective.begin(setting, wrong, None, None)


def test_a_teacher_that_is_described_has_its_own_boundaries(source, student):
    """Where the text is read, whatever else the experiment says of the teacher."""
    exp = experiment(source, student)
    tokenizers = atom_jax.load(student).tokenizer, atom_jax.load(source).tokenizer
    described = dataclasses.replace(exp.objective, teacher=atom_jax.load(source).config)
    for objective in (exp.objective, described):
        found = objective._boundaries(Setting(exp, None, tokenizers[0]))
        assert found == tuple(byte_view(t).boundaries for t in tokenizers) and all(found)
    assert described._boundaries(Setting(exp, None, _Tokenizer(9))) == ((), ())


def test_large_vocabularies_are_never_whole():
    """16 rows of 512 tokens, with 128 thousand of them to choose from on both sides."""
    cfg = TransformerConfig(
        vocab_size=128_000, d_model=16, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=16, d_ff=16, remat=True
    )
    exp = Experiment(model=cfg, objective=Alm(teacher=cfg, latent=1.0, balance=True), optim=transfer.tiny().optim)
    exp = config.override(exp, ["data.batch_size=16", "data.seq_len=512", "data.tokens=512", "mesh.data=1"])
    with jax.set_mesh(mesh(exp.mesh)):
        program = Program(exp, mesh(exp.mesh), _Tokenizer(cfg.vocab_size))
        objective, setting = program.objective, program.setting

        def loss(p, batch):
            return objective.loss(p, batch, None, None, setting=setting).objective

        found = jax.make_jaxpr(jax.grad(loss))(program.state.params, program.abstract_batch())
    assert max(sizes(found.jaxpr)) <= 2 * scoring.LIMIT < 16 * 512 * cfg.vocab_size / 8


def test_losses_count_by_the_lengths_of_their_gradients():
    cfg = TransformerConfig(vocab_size=64, d_model=16, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=16, d_ff=16)
    objective = Alm(teacher=cfg, how=ALM(tau=1.0, debias=False, merge=None))
    exp = Experiment(model=cfg, objective=objective, optim=transfer.tiny().optim)
    exp = config.override(exp, ["data.batch_size=2", "data.seq_len=16", "data.tokens=12", "mesh.data=1"])
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh(exp.mesh)):
        setting = Setting(exp, mesh(exp.mesh), _Tokenizer(cfg.vocab_size))
        rows = {name: np.array(x) for name, x in objective.described(setting).items()}
        for name in ("ids", "tokens", "targets"):
            rows[name] = rng.integers(0, 64, rows[name].shape, np.int32)
        for name in ("chunks", "token_chunks"):
            rows[name] += np.arange(rows[name].shape[1], dtype=np.int32) // 2
        rows["segments"] += 1
        rows["loss_mask"] = np.ones_like(rows["loss_mask"])
        spec = transformer.spec(cfg) | objective.extra_spec(cfg)
        p = params.init(
            jax.random.key(0), params.map_specs(lambda s: dataclasses.replace(s, init=params.normal(0.3)), spec)
        )

        def gradient(p, **changes):
            mine, batch = dataclasses.replace(objective, **changes), jax.tree.map(jnp.asarray, objective.batch(rows))
            grads = jax.grad(lambda p: mine.loss(p, batch, None, None, setting=setting).objective)(p)
            return jnp.concatenate(
                [x.ravel() for x in jax.tree.leaves({k: x for k, x in grads.items() if k != "source"})]
            )

        every = ({}, {"latent": 1.0}, {"latent": 1.0, "balance": True}, {"latent": 3.0, "balance": True})
        chunks, both, *found = map(np.asarray, jax.jit(lambda p: [gradient(p, **changes) for changes in every])(p))
    parts = np.stack([chunks, both - chunks], axis=1)
    (a, b), (c, d) = (np.linalg.lstsq(parts, x, rcond=None)[0] for x in found)
    np.testing.assert_allclose(parts @ [a, b], found[0], atol=1e-4 * np.abs(found[0]).max())
    assert (
        a + b == pytest.approx(1, rel=1e-3)
        and c == pytest.approx(a, rel=1e-3)
        and d == pytest.approx(3 * b, rel=1e-3)
    )
    assert min(a, b) > 0 and abs(a - b) > 0.1
    with pytest.raises(AtomError, match=r"alm\.balance: there is one loss only"):
        Alm(balance=True)


@pytest.mark.parametrize(
    "settings, words",
    [
        (["objective.source="], "alm.source is not set"),
        (["data.tokens=0"], "alm and data.tokens need each other"),
        (["optim.groups="], "source/embed must not learn"),
        (["objective.source=tests/golden/hf_tiny/llama"], "has no tokenizer"),
    ],
)
def test_what_does_not_fit_is_one_sentence(source, student, tmp_path, settings, words):
    with pytest.raises(AtomError, match=words):
        loop.fit(experiment(source, student, *settings), tmp_path)
