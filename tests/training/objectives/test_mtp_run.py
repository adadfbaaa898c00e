"""Multi-token heads are trained beside a model that stays as it is, and then draft what it says."""

import dataclasses
import json
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import config, params
from atom_jax.__main__ import main
from atom_jax.checkpoint import heads, store
from atom_jax.checkpoint.safetensors_io import SafetensorsSource, write_file
from atom_jax.models import mtp, transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.session.drafts.pace import Pace
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.training import loop, start
from atom_jax.training.objectives import MultiToken
from atom_jax.training.objectives.base import Setting
from atom_jax.training.record import read
from atom_jax.typing import LM, AtomError, Batch
from configs import mtp as configs_mtp

CFG = TransformerConfig(
    vocab_size=264, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=64, tie_embeddings=False,
    max_length=512,
)  # fmt: skip
# What is said first of all bytes of a text: the one that follows in this circle.
CIRCLE = list(b"abcdefgh")


def model():
    """Goes round in circles: what it says depends on the latest byte most of all."""
    tree = params.init(jax.random.key(0), transformer.spec(CFG))
    at, to = np.array(CIRCLE), np.roll(CIRCLE, -1)
    unembed = np.zeros((32, 264), np.float32)
    embed = np.asarray(tree["embed"]) * 50
    unembed[:, to] = embed[at].T * 0.4
    return LM(CFG, {**tree, "embed": jnp.asarray(embed), "unembed": jnp.asarray(unembed)}, ByteTokenizer())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model"
    store.save_model(path, model())
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    rng = np.random.default_rng(0)
    path.write_bytes(bytes(rng.choice(CIRCLE, 60_000).tolist()))
    return path


@pytest.fixture(scope="module")
def run(base, text, tmp_path_factory, one_device):
    """A run of configs/mtp.py:tiny, and what its validations said."""
    place = tmp_path_factory.mktemp("run")
    exp = start.configure("configs/mtp.py:tiny", [f"init_from={base}", f"data.sources={text}"])
    assert loop.fit(exp, place).step == exp.train.steps
    return place, [x for x in read(place / "metrics.jsonl") if x["kind"] == "validation"]


@pytest.fixture
def free(monkeypatch):
    """Drafts cost nothing, and so are tried wherever there are any."""
    monkeypatch.setattr(Pace, "measures", False)
    monkeypatch.setattr(Pace, "price", lambda self, n: 0.0)
    monkeypatch.setattr(Pace, "take", lambda *_: None)


def test_heads_learn_and_the_model_stays(run, base):
    place, (before, after) = run
    assert after["kl"] < 0.5 * before["kl"]
    assert after["accepted"] > before["accepted"] + 1
    assert after["agreement_1"] >= after["accepted"] / 3
    chex.assert_trees_all_equal(atom_jax.load(place).params, atom_jax.load(base).params)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_more_of_what_they_draft_is_accepted(run, tmp_path, free, capsys, temperature):
    place, _ = run
    lm, prompts = atom_jax.load(place), ["abcab", "h", "ecgha"]
    assert main(["atom_jax", "adapter", str(place), str(tmp_path / "heads")]) == 0
    assert "3 multi-token heads for a llama" in capsys.readouterr().out
    untrained = params.init(jax.random.key(0), mtp.spec(32, 3, 0))
    heads.save(tmp_path / "untrained", lm.config, untrained)
    how = {"max_new_tokens": 40, "temperature": temperature, "stop_ids": ()}
    plain = atom_jax.generate(lm, prompts, **how)
    shares = []
    for name in ("heads", "untrained"):
        made = atom_jax.generate(lm, prompts, draft=f"mtp:heads={tmp_path / name}", **how)
        assert made.ids == plain.ids
        shares.append(float(np.mean(made.acceptance)))
    assert shares[0] > shares[1] + 0.3
    # A draft has no more tokens than there are heads.
    assert made.stats["tokens_per_call"] <= 4
    same = atom_jax.generate(lm, prompts, draft=f"mtp:heads={place}", **how)
    assert same.ids == plain.ids and np.mean(same.acceptance) == shares[0]


def test_they_are_written_and_read(run, tmp_path, capsys):
    place, _ = run
    cfg, p = heads.of_run(place)
    heads.save(tmp_path / "heads", cfg, p, name="a/base")
    found = heads.load(tmp_path / "heads", CFG)
    chex.assert_trees_all_equal(found, p, heads.load(place, CFG))
    assert main(["atom_jax", "info", str(tmp_path / "heads"), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "multi-token heads" in said and "3, of width 32" in said and "a/base" in said and "are what was" in said
    half = heads.load(tmp_path / "heads", dataclasses.replace(CFG, dtype="bfloat16"))
    assert {str(x.dtype) for x in jax.tree.leaves(half)} == {"bfloat16"}


def test_targets_lie_within_a_document_and_count():
    """Against a loop over positions and heads."""
    rng = np.random.default_rng(1)
    tree, cfg = model().params, CFG
    ids = rng.choice(CIRCLE, (2, 12)).astype(np.int32)
    segments = np.array([[1] * 5 + [2] * 6 + [0], [1] * 12], np.int32)
    positions = np.array([[*range(5), *range(6), 0], range(12)], np.int32)
    targets = np.roll(ids, -1, axis=1)
    mask = np.ones((2, 12), bool)
    mask[0, [4, 10, 11]] = mask[1, :6] = mask[1, 11] = False
    batch = Batch(*map(jnp.asarray, (ids, positions, segments, targets, mask)))
    own = params.init(jax.random.key(2), mtp.spec(32, 2, 16))
    own["down"] = own["down"] + 0.1 * jax.random.normal(jax.random.key(3), own["down"].shape)
    setting = Setting(types.SimpleNamespace(model=cfg), None, None)
    objective = MultiToken(2, 16, decay=0.5)
    found = objective.loss(tree | {mtp.NAME: own}, batch, None, None, setting=setting)
    x = transformer.hidden(tree, batch, cfg=cfg)[0]
    law = lambda x: jax.nn.log_softmax(transformer.logits(tree, x[None, None], cfg=cfg)[0, 0])  # noqa: E731
    sums, numbers = np.zeros(2), np.zeros(2)
    for r in range(2):
        for t in range(12):
            state = x[r, t]
            for k in range(2):
                later = t + k + 1
                if later >= 12 or segments[r, later] != segments[r, t] or not segments[r, t]:
                    continue
                one = jax.tree.map(lambda a, k=k: a[k], own)
                state = mtp.head(one, state, tree["embed"][ids[r, later]])
                if mask[r, later]:
                    teacher = law(x[r, later])
                    sums[k] += float(jnp.sum(jnp.exp(teacher) * (teacher - law(state))))
                    numbers[k] += 1
    assert numbers.tolist() == [float(n) for n in objective.counts(batch, setting)["guessed"]] == [12, 10]
    weights = np.array([2, 1]) / 3
    np.testing.assert_allclose(found.objective / mask.sum(), (weights * sums / numbers).sum(), rtol=1e-4)
    kl, over = found.learned["kl"]
    np.testing.assert_allclose(kl / over, (weights * sums).sum() / (weights * numbers).sum(), rtol=1e-4)


@pytest.mark.parametrize("name", configs_mtp.VARIANTS)
def test_variants_are_written_and_read(name):
    exp = config.load_file(f"configs/mtp.py:{name}")
    assert config.from_json(object, config.to_json(exp)) == exp


@pytest.mark.parametrize(
    "settings, words",
    [
        (["optim.groups="], "mtp: embed must not learn"),
        (["data.seq_len=4"], "rows of data.seq_len 4 tokens are too short for 3 heads"),
        (["objective.heads=0"], "heads: expected a whole number from 1 to 64, got 0"),
    ],
)
def test_runs_that_do_not_fit_are_refused(base, text, tmp_path, settings, words):
    with pytest.raises(AtomError, match=words) as e:
        loop.fit(
            start.configure("configs/mtp.py:tiny", [f"init_from={base}", f"data.sources={text}", *settings]), tmp_path
        )
    assert "\n" not in str(e.value)


def test_bad_heads_are_one_sentence(tmp_path):
    p = params.init(jax.random.key(0), mtp.spec(32, 2, 0))
    heads.save(tmp_path, CFG, p)
    file = tmp_path / heads.CONFIG
    table = json.loads(file.read_text())
    for change, words in (
        ({"format": 2}, r"mtp\.json: format is 2; only 1 is known"),
        ({"heads": 3}, r"mtp\.safetensors: down is \[2, 32, 32\], expected \[3, 32, 32\]"),
        ({"width": "wide"}, r"mtp\.json: width is wide; it must be a whole number"),
        ({"base": table["base"] | {"n_layers": 7}}, r"mtp\.json: n_layers is 7 in the adapter and 2 in the model"),
    ):
        file.write_text(json.dumps(table | change))
        with pytest.raises(AtomError, match=words):
            heads.load(tmp_path, CFG)
    file.write_text(json.dumps(table))
    source = SafetensorsSource(tmp_path / heads.TENSORS)
    write_file({k: source.read(k) for k in source.infos if k != "token"}, tmp_path / heads.TENSORS)
    with pytest.raises(AtomError, match=r"token is absent, expected \[2, 32, 32\]"):
        heads.load(tmp_path, CFG)
    (tmp_path / heads.TENSORS).unlink()
    with pytest.raises(AtomError, match=r"mtp\.safetensors: no such file"):
        heads.load(tmp_path, CFG)
    with pytest.raises(AtomError, match="nowhere: no heads are there"):
        heads.load(tmp_path / "nowhere", CFG)


def test_runs_without_heads_are_refused(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(store, "settings", lambda path: {"objective": None})
    with pytest.raises(AtomError, match="the run trained no multi-token heads"):
        heads.load(tmp_path, CFG)
