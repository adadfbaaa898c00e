"""What every boundary rule must do: look back only, read a text in any pieces, keep documents and rows apart, and
not mind padding."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import config, params
from atom_jax.chunking import rules
from atom_jax.chunking.bytemodel import ByteModel
from atom_jax.chunking.rules.cosine import Cosine
from atom_jax.chunking.rules.entropy import Entropy
from atom_jax.chunking.rules.fixed import Fixed
from atom_jax.chunking.rules.predictor import Predictor
from atom_jax.chunking.rules.spaces import Spaces
from atom_jax.chunking.rules.symbol import Symbol
from atom_jax.chunking.types import END, START, Boundary, Seen
from atom_jax.kvcache.memory import Stack
from atom_jax.nn.attention import Tokens
from atom_jax.typing import AtomError

D, T = 8, 13
SMALL = ByteModel(d_model=16, n_layers=2, n_heads=2, d_ff=16, window=4)
CASES = {
    "cosine": Cosine(target=2.0),
    "gumbel": Predictor(),
    "marks": Predictor(supervision="marks"),
    "scripts": Predictor(scripts=("latin", "cyrillic", "devanagari"), priors=(0.2, 0.1, 0.3)),
    "whitespace": Spaces(characters=(0x20, 0x0A)),
    "spacebyte": Spaces(style="spacebyte"),
    "monotonic": Entropy(mode="monotonic", model=SMALL),
    "both": Entropy(threshold=4.5, mode="both", max_length=3, model=SMALL),
    "block": Fixed(3),
    "dynpool": Fixed(3, phase="dynpool"),
    "symbol": Symbol(id=259),
}
TEXT = "a к क.Дe  x!é \nः 9b? " * 3


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@functools.cache
def weights(cfg):
    p = params.init(jax.random.key(3), rules.of(cfg).spec(cfg, D))
    # Larger than at the start, so that decisions differ between positions.
    scale = 3 if isinstance(cfg, Entropy) else 60
    return jax.tree.map(lambda x: scale * x if x.ndim > 1 else x, p)


def call(cfg, seen, state):
    return compiled(weights(cfg), seen, state, cfg=cfg)


@functools.partial(jax.jit, static_argnames="cfg")
def compiled(p, seen, state, cfg):
    return rules.of(cfg).apply(p, seen, state, cfg=cfg)


def fresh(cfg, b=2):
    return rules.of(cfg).init_state(cfg, D, b)


def text(seed, b=2, t=T):
    """Seen [b, t], one document per row; the ids are bytes of several scripts and a few symbols."""
    rng = np.random.default_rng(seed)
    data = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)
    ids = np.stack([data[i : i + t] for i in rng.integers(0, len(data) - t, b)])
    ids = np.where(rng.random(ids.shape) < 0.1, 259, ids)
    positions = np.tile(np.arange(t, dtype=np.int32), (b, 1))
    return Seen(rng.normal(size=(b, t, D)).astype(np.float32), Tokens(positions, np.ones_like(positions)), ids)


def part(seen, start, length, t=T):
    """`length[r]` positions of each row r from `start[r]` on, then padding of arbitrary content up to t."""
    junk = text(99, len(start), t)
    h, ids, positions = (np.array(x) for x in (junk.h, junk.ids, 0 * junk.ids))
    segments = np.zeros_like(positions)
    for r, (s, n) in enumerate(zip(start, length)):
        for new, old in ((h, seen.h), (ids, seen.ids), (positions, seen.tokens.positions)):
            new[r, :n] = old[r, s : s + n]
        segments[r, :n] = 1
    return Seen(h, Tokens(positions, segments), ids)


def same(a: Boundary, b: Boundary, rows=slice(None), n=T, shift=0):
    """Positions [0, n) of `a` are positions [shift, shift + n) of `b`."""
    np.testing.assert_array_equal(a.mark[rows, :n], b.mark[rows, shift : shift + n])
    for x, y in ((a.p, b.p), (a.logit, b.logit), (a.hard, b.hard)):
        assert (x is None) == (y is None)
        if x is not None:
            np.testing.assert_allclose(x[rows, :n], y[rows, shift : shift + n], rtol=1e-5, atol=1e-5)


def test_marks_are_what_the_types_say(case):
    seen = text(0)
    whole, state = call(case, seen, fresh(case))
    assert whole.mark.shape == (2, T) and whole.mark.dtype == bool
    assert whole.kind == (START if isinstance(case, Cosine) else END)
    assert 0 < int(whole.mark.sum()) < 2 * T
    chex.assert_trees_all_equal_shapes_and_dtypes(state, fresh(case))
    for x in (whole.p, whole.logit, whole.hard):
        assert x is None or (x.shape == (2, T) and x.dtype == jnp.float32)
    if whole.hard is not None:
        np.testing.assert_array_equal(whole.hard, whole.mark)


def test_later_positions_change_nothing_earlier(case):
    seen, other = text(0), text(1)
    whole, _ = call(case, seen, fresh(case))
    for n in range(1, T):
        h, ids = (np.concatenate([a[:, :n], b[:, n:]], 1) for a, b in ((seen.h, other.h), (seen.ids, other.ids)))
        same(call(case, seen.replace(h=h, ids=ids), fresh(case))[0], whole, n=n)


def test_two_calls_split_anywhere_equal_one(case):
    """Rows are split at different places, and each call has padding after its positions."""
    seen = text(0)
    whole, end = call(case, seen, fresh(case))
    for n in range(T + 1):
        cut = [n, T - n]
        first, state = call(case, part(seen, [0, 0], cut), fresh(case))
        second, state = call(case, part(seen, cut, [T - c for c in cut]), state)
        for r, c in enumerate(cut):
            same(first, whole, rows=r, n=c)
            same(second, whole, rows=r, n=T - c, shift=c)
            assert not np.asarray(first.mark)[r, c:].any() and not np.asarray(second.mark)[r, T - c :].any()
        if 0 < n < T:
            chex.assert_trees_all_close(visible(state), visible(end), atol=1e-5)


def visible(state):
    """The state without what a window holds of no document."""
    window = getattr(state, "model", None)
    if window is None:
        return state
    keep = window.same[None, :, None, :, None]
    keys, values = (
        Stack(jnp.where(jnp.broadcast_to(keep, x.states.shape), x.states, 0)) for x in (window.keys, window.values)
    )
    positions = jnp.where(window.same, window.positions, 0)
    return state.replace(model=window.replace(keys=keys, values=values, positions=positions))


def test_byte_by_byte_equals_one_call(case):
    seen = text(0)
    whole, _ = call(case, seen, fresh(case))
    state = fresh(case)
    for i in range(T):
        one, state = call(case, part(seen, [i, i], [1, 1], t=1), state)
        same(one, whole, n=1, shift=i)


def test_calls_of_other_lengths_equal_one(case):
    seen, n = text(0), T - 3
    whole, _ = call(case, seen, fresh(case))
    first, state = call(case, part(seen, [0, 0], [n, n], t=n), fresh(case))
    same(first, whole, n=n)
    for i in range(n, T):
        one, state = call(case, part(seen, [i, i], [1, 1], t=1), state)
        same(one, whole, n=1, shift=i)


def test_packed_documents_equal_separate_rows(case):
    seen, n = text(0), 5
    apart, _ = call(case, part(seen, [0, 0], [n, T - n]), fresh(case))

    def pack(x):
        return np.stack([np.concatenate([x[0, :n], x[1, : T - n]])] * 2)

    segments = np.array([[1] * n + [2] * (T - n)] * 2, np.int32)
    packed = Seen(pack(seen.h), Tokens(pack(seen.tokens.positions), segments), pack(seen.ids))
    together, state = call(case, packed, fresh(case))
    same(apart, together, rows=0, n=n)
    np.testing.assert_array_equal(apart.mark[1, : T - n], together.mark[0, n:])
    # The last document goes on in a later call, whose rows count their segments anew.
    longer = text(2)
    longer = longer.replace(tokens=Tokens(longer.tokens.positions + T - n, longer.tokens.segments))
    _, alone = call(case, part(seen, [0, 0], [0, T - n]), fresh(case))
    same(call(case, longer, state)[0], call(case, longer, alone)[0], rows=1)


def test_padding_on_either_side_changes_nothing(case):
    seen, n = text(0), T - 3
    bare = jax.tree.map(lambda x: x[:, :n], seen)
    right = part(seen, [0, 0], [n, n])
    whole, state = call(case, bare, fresh(case))
    padded, padded_state = call(case, right, fresh(case))
    same(whole, padded, n=n)
    np.testing.assert_allclose(whole.loss, padded.loss, rtol=1e-5)
    chex.assert_trees_all_close(visible(padded_state), visible(state), atol=1e-5)
    left = jax.tree.map(lambda x: np.roll(x, T - n, axis=1), right)
    padded, padded_state = call(case, left, fresh(case))
    same(whole, padded, n=n, shift=T - n)
    assert not np.asarray(padded.mark)[:, : T - n].any()
    chex.assert_trees_all_close(visible(padded_state), visible(state), atol=1e-5)


def test_an_idle_row_keeps_its_state(case):
    seen = text(0)
    _, state = call(case, seen, fresh(case))
    boundary, after = call(case, part(seen, [0, 0], [0, 0]), state)
    assert not np.asarray(boundary.mark).any() and np.isfinite(boundary.loss)
    chex.assert_trees_all_equal(after, state)


def test_gradients_are_finite(case):
    """Also at the first position, whose predecessor is a vector of zeros."""

    def loss(p, h):
        out, _ = rules.of(case).apply(p, text(0).replace(h=h), fresh(case), cfg=case)
        return out.loss + sum(jnp.sum(x) for x in (out.p, out.hard) if x is not None)

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(weights(case), jnp.asarray(text(0).h).at[:, 3].set(0.0))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_rules_of_bytes_refuse_deeper_stages():
    for cfg in (Spaces(), Symbol(), Entropy(model=SMALL), CASES["scripts"]):
        with pytest.raises(AtomError, match="reads token ids"):
            rules.of(cfg).apply(weights(cfg), text(0).replace(ids=None), fresh(cfg), cfg=cfg)


def test_configurations_survive_json(case):
    assert config.from_json(object, json.loads(json.dumps(config.to_json(case)))) == case


def test_only_rules_are_rules():
    with pytest.raises(AtomError, match="rule: expected one of Cosine, Predictor"):
        rules.of(3)
