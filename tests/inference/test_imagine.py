"""What a world model knows and imagines, by however many calls it comes to know it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import params
from atom_jax.chunking.config import per_stage
from atom_jax.chunking.rules.surprise import Surprise
from atom_jax.inference import imagine as lib
from atom_jax.kvcache import memory, policies
from atom_jax.models import hnet, registry, world
from atom_jax.models.hnet import ports
from atom_jax.models.hnet.examples import examples
from atom_jax.typing import LM, AtomError, Frames
from tests.models.tiny_images import lively

B, T, N, H = 3, 11, 2, 4
EXAMPLES = world.FAMILY.examples()


def frames(lm, seed=0, b=B, t=T):
    """Random frames that often stay as they are, so that some are less surprising than others."""
    rng, port = np.random.default_rng(seed), lm.config.port
    shape = (b, t, *port.grid)
    obs = rng.integers(0, port.classes, shape, np.uint8) if port.classes else rng.random(shape, np.float32)
    for i in range(1, t):
        same = rng.random((b, *port.grid)) < 0.7 if port.classes else rng.random((b, *[1] * len(port.grid))) < 0.5
        obs[:, i] = np.where(same, obs[:, i - 1], obs[:, i])
    index, nothing = np.tile(np.arange(t, dtype=np.int32), (b, 1)), np.zeros((b, t), np.float32)
    action = rng.integers(0, port.actions, (b, t), np.int32)
    return Frames(obs, action, nothing, nothing > 0, index, np.ones_like(index))


def read(lm, episode):
    """Frames as the model reads them."""
    made = jax.tree.map(jnp.asarray, episode)
    return made.replace(obs=lib._encode(lm.params, made.obs, lm.config))


def model(name):
    """An example with large random parameters, and a threshold that about half of the frames exceed."""
    cfg = EXAMPLES[name]
    p = params.init(jax.random.key(1), registry.of(cfg).spec(cfg))
    p["local"]["w"] = (3 if isinstance(cfg.port, ports.Pixels) else 40) * p["local"]["w"]
    p |= {table: 3 * p[table] for table in ("cells", "codes") if table in p}
    p |= {"tokenizer": lively(p["tokenizer"])} if "tokenizer" in p else {}
    lm = LM(cfg, p, None)
    if isinstance(cfg.chunking[0].rule, Surprise):
        made = read(lm, frames(lm))
        local = jax.jit(lambda p: world.local(p, made, cfg=cfg))(p)
        nats = ports.of(cfg).nll(local[:, :-1], made.obs[:, 1:], cfg)
        p["stage0"]["rule"]["tau"] = jnp.median(nats)
    return lm


@pytest.fixture(scope="module", params=["surprise", "fixed"])
def lm(request):
    return model(request.param)


every_port = pytest.mark.parametrize("lm", ["surprise", "fixed", "pixels", "codes"], indirect=True)


@pytest.fixture(scope="module")
def actions():
    return np.random.default_rng(3).integers(0, 4, (B, N, H))


def close(a, b):
    np.testing.assert_array_equal(a.units, b.units)
    # Classes exactly.
    np.testing.assert_allclose(a.frames, b.frames, atol=1e-5 if a.frames.dtype == np.float32 else 0)
    np.testing.assert_allclose(a.reward, b.reward, atol=1e-5)
    np.testing.assert_allclose(a.done, b.done, atol=1e-5)


@every_port
def test_frames_may_be_seen_at_once_or_one_by_one(lm, actions):
    episode = frames(lm)
    whole = atom_jax.observe(lm, episode)
    assert 2 < float(whole.units.mean()) < T - 2
    first = jax.tree.map(lambda x: x[:, :5], episode)
    rest = jax.tree.map(lambda x: x[:, 4:], episode)
    parts = atom_jax.observe(lm, rest, atom_jax.observe(lm, first))
    # Fed with what really came, frame by frame.
    begin = atom_jax.observe(lm, jax.tree.map(lambda x: x[:, :1], episode))
    fed = atom_jax.imagine(lm, begin, episode.action[:, None, :-1], frames=episode.obs[:, None, 1:])
    marks = jax.jit(lambda f: world.hidden(lm.params, f, cfg=lm.config)[2]["boundaries"][0])(read(lm, episode))
    np.testing.assert_array_equal(fed.units[:, 0], marks[:, :-1])
    np.testing.assert_array_equal(whole.units, marks[:, :-1].sum(1))
    np.testing.assert_array_equal(parts.units, whole.units)
    close(atom_jax.imagine(lm, parts, actions), atom_jax.imagine(lm, whole, actions))
    assert int(fed.stats["main_steps"]) == int(whole.units.sum())
    assert int(fed.stats["main_calls"]) == int(np.any(np.asarray(fed.units[:, 0]), axis=0).sum())


@every_port
def test_futures_and_rows_know_nothing_of_each_other(lm, actions):
    episode = frames(lm, 1)
    state = atom_jax.observe(lm, episode)
    together = atom_jax.imagine(lm, state, actions)
    assert together.frames.shape == (B, N, H, *lm.config.port.grid)
    for i in range(N):
        alone = atom_jax.imagine(lm, state, actions[:, i : i + 1])
        close(alone, jax.tree.map(lambda x, i=i: x[:, i : i + 1], together.replace(stats={})).replace(stats={}))
    row = atom_jax.observe(lm, jax.tree.map(lambda x: x[1:2], episode))
    alone = atom_jax.imagine(lm, row, actions[1:2])
    close(alone, jax.tree.map(lambda x: x[1:2], together.replace(stats={})))


@every_port
def test_rows_may_have_seen_less_than_others(lm, actions):
    episode = frames(lm, 2)
    segments = np.ones((B, T), np.int32)
    segments[0, 7:] = 0
    state = atom_jax.observe(lm, episode.replace(segments=segments))
    short = atom_jax.observe(lm, jax.tree.map(lambda x: x[:1, :7], episode))
    assert state.length.tolist() == [7, T, T] and short.length.tolist() == [7]
    a, b = atom_jax.imagine(lm, state, actions), atom_jax.imagine(lm, short, actions[:1])
    close(b, jax.tree.map(lambda x: x[:1], a.replace(stats={})))
    # Of the row that has ended nothing more comes.
    later = frames(lm, 5)
    on = atom_jax.observe(lm, later.replace(segments=segments * (np.arange(B) > 0)[:, None]), state)
    assert on.length.tolist() == [7, 2 * T - 1, 2 * T - 1]
    np.testing.assert_array_equal(on.obs[0], state.obs[0])
    np.testing.assert_array_equal(on.obs[1:], read(lm, later).obs[1:, -1])


@pytest.mark.parametrize("name", EXAMPLES)
def test_nothing_depends_on_what_comes_later(name):
    lm, at = model(name), 6
    one, two = (read(lm, frames(lm, seed)) for seed in (4, 5))
    mixed = jax.tree.map(lambda a, b: jnp.concatenate([a[:, :at], b[:, at:]], axis=1), one, two)
    run = jax.jit(lambda f: world.hidden(lm.params, f, cfg=lm.config))
    (x, _, a), (y, _, b) = run(one), run(mixed)
    np.testing.assert_array_equal(a["boundaries"][0][:, :at], b["boundaries"][0][:, :at])
    np.testing.assert_array_equal(x[:, :at], y[:, :at])
    assert not np.array_equal(x[:, at:], y[:, at:])


def test_nothing_is_compiled_again(lm, actions):
    def plan(seed):
        return atom_jax.plan(lm, atom_jax.observe(lm, frames(lm, seed)), "shooting:n=4,horizon=3")

    plan(0)
    sizes = [f._cache_size() for f in (lib._observe, lib._plan)]
    found = plan(7)
    assert [f._cache_size() for f in (lib._observe, lib._plan)] == sizes
    assert found.actions.shape == (B, 3) and {"main_steps", "main_steps_imagined"} <= set(found.stats)


def test_units_beyond_the_room_for_them_are_not_lost():
    lm = model("surprise")
    lm.params["stage0"]["rule"]["tau"] = jnp.float32(-1)  # every frame is more than that
    tight = dataclasses.replace(lm.config, chunking=(dataclasses.replace(lm.config.chunking[0], capacity=0.5),))
    assert per_stage(12, tight.chunking)[1] < 11
    state = atom_jax.observe(LM(tight, lm.params, None), frames(lm, 6, t=12))
    assert state.units.tolist() == [11] * B and state.cache.parts.inside.length.tolist() == [11] * B


def test_futures_copy_what_a_policy_holds(actions):
    lm = registry.with_memory(model("surprise"), policies.parse("tova:budget=3"))
    slots = lambda state: memory.layers(state.cache.parts.inside)[0].k.shape[-2]  # noqa: E731
    fitted = lambda state: state.replace(cache=memory.fit(state.cache, H))  # noqa: E731
    state = atom_jax.observe(lm, frames(lm, 6, t=40))
    assert int(state.units.min()) > 8 and slots(state) == slots(fitted(state)) == 3
    on = atom_jax.observe(lm, frames(lm, 7, t=8), state)
    held = int(memory.use(on.cache.parts.inside)[0].max())
    room = on.replace(cache=memory.grow(on.cache, 160))
    assert 3 < held <= slots(fitted(room)) < 12 < 160 < slots(room)
    many, few = (jax.eval_shape(lambda s: lib.forked(s, 50, H), s) for s in (room, fitted(room)))
    assert params.nbytes(many.cache.parts.inside) > 10 * params.nbytes(few.cache.parts.inside)
    wide = lib._imagine(lm.params, room, jnp.asarray(actions), None, None, lm.config)
    close(atom_jax.imagine(lm, on, actions), wide)


def test_tree_search_goes_with_rows_that_are_gathered(lm):
    state = atom_jax.observe(lm, frames(lm, 3))
    wide = atom_jax.plan(lm, state, "tree:width=16,horizon=2")
    every = np.array([[[a, b] for a in range(4) for b in range(4)]] * B)
    out = atom_jax.imagine(lm, state, every)
    best = np.asarray(lib.planners.returns(out.reward, out.done, lm.config.gamma)).max(1)
    np.testing.assert_allclose(wide.value, best, atol=1e-5)


def test_bad_input_is_one_sentence(lm):
    episode, text = frames(lm), LM(examples()["hnet"], {}, None)
    state = atom_jax.observe(lm, episode)
    for run, words in (
        (lambda: atom_jax.observe(text, episode), "takes a world model"),
        (lambda: atom_jax.observe(lm, episode.replace(obs=episode.obs[:, :, :2])), "expected frames"),
        (lambda: atom_jax.observe(lm, episode.replace(obs=episode.obs + 1)), "classes below 8"),
        (lambda: atom_jax.observe(lm, episode.replace(action=episode.action + 1)), "from 0 to 3"),
        (lambda: atom_jax.imagine(lm, state, [[[4]]] * B), "from 0 to 3"),
        (lambda: atom_jax.imagine(lm, state, [[[1]]]), r"expected \[3, futures, steps\]"),
        (lambda: atom_jax.imagine(lm, state, [[[1]]] * B, frames=episode.obs), "frames: expected frames"),
        (lambda: atom_jax.imagine(lm, state, [[[1], [1, 2]]] * B), "equal length"),
        (lambda: atom_jax.plan("runs/watch", state, "random"), "as atom_jax.load gives it"),
        (lambda: atom_jax.observe(lm, episode.obs), r"expected atom_jax\.Frames"),
        (lambda: atom_jax.observe(lm, jax.tree.map(lambda x: x[:0], episode)), "at least one row"),
        (lambda: atom_jax.observe(lm, episode.replace(segments=episode.segments[:, :3])), "expected segments"),
        (lambda: atom_jax.plan(lm, state, "magic"), "planner 'magic'"),
        (lambda: atom_jax.generate(lm, [[1, 2]], 3), "kind world, which reads frames and no text"),
        (lambda: dataclasses.replace(lm.config, port=ports.Bytes()), "reads ids|is for frames"),
    ):
        with pytest.raises(AtomError, match=words):
            run()
    with pytest.raises(AtomError, match="is for frames"):
        dataclasses.replace(examples()["hnet"], chunking=EXAMPLES["surprise"].chunking)


def test_an_hnet_may_read_frames_too():
    cfg = dataclasses.replace(
        examples()["fixed-gumbel"], port=ports.Cells(grid=(3, 3), classes=8, actions=4, hidden=8)
    )
    p = params.init(jax.random.key(0), hnet.spec(cfg))
    lm = LM(cfg, p, None)
    out, _ = jax.jit(lambda f: hnet.apply(p, f, cfg=cfg))(read(lm, frames(lm)))
    assert out.logits.shape == (B, T, 9, 8) and "bytes_per_unit_0" in out.aux["metrics"]


def test_futures_share_what_was_seen_before_them(lm, actions, monkeypatch):
    state = atom_jax.observe(lm, frames(lm, 6))
    shared = atom_jax.imagine(lm, state, actions)
    sizes = [x.shape for x in jax.tree.leaves(lib.forked(state, 50, H).cache.parts.inside.layers)]
    assert [shape[1] for shape in sizes if shape[-2:-1] == (H,)] == [50 * B] * 2  # what is stored since
    assert [shape[1] for shape in sizes if len(shape) == 5 and shape[-2] != H] == [B] * 2
    monkeypatch.setattr(lib, "forked", lambda state, n, room: lib.taken(state, jnp.repeat(jnp.arange(B), n)))
    lib._imagine.clear_cache()
    close(shared, atom_jax.imagine(lm, state, actions))
