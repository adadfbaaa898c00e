"""Generation against the official numbers, and what must hold for any prompt, batch and cache size."""

import collections
import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import atom_jax
from atom_jax import params as params_lib
from atom_jax import sharding
from atom_jax.inference import generate as module
from atom_jax.inference.generate import generate
from atom_jax.kvcache import memory
from atom_jax.kvcache.dense import bucket
from atom_jax.models import registry, transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.session import decode, laid_out, queue, reading, session
from atom_jax.session.sampling import row_keys
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM, AtomError, Batch

PROMPTS = [[5, 9, 2], list(range(3, 40)), [7], list(range(60, 40, -1))]


@pytest.fixture(scope="module", params=list(transformer.FAMILIES))
def case(request, golden):
    directory = golden / "hf_tiny" / request.param
    return atom_jax.load(directory), load_file(directory / "io.safetensors")


@pytest.fixture(scope="module")
def tiny(golden):
    return atom_jax.load(golden / "hf_tiny" / "olmo3")


@pytest.fixture(scope="module")
def byte_lm():
    cfg = TransformerConfig(d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=48, max_length=512)
    p = params_lib.init(jax.random.key(3), transformer.spec(cfg))
    return LM(cfg, p, ByteTokenizer())


@pytest.fixture
def traced(monkeypatch):
    """A list that grows whenever the model is traced."""
    calls, hidden, family = [], transformer.hidden, registry.FAMILIES["olmo3"]
    counted = lambda *a, **k: calls.append(1) or hidden(*a, **k)  # noqa: E731
    monkeypatch.setattr(transformer, "hidden", counted)
    monkeypatch.setitem(registry.FAMILIES, "olmo3", dataclasses.replace(family, hidden=counted))
    return calls


def variant(lm, **changes):
    """The same model under a configuration that nothing has compiled for."""
    return dataclasses.replace(lm, config=dataclasses.replace(lm.config, **changes))


def test_greedy_ids_equal_the_official_ones(case):
    lm, io = case
    gen = generate(lm, io["input_ids"], max_new_tokens=48)
    np.testing.assert_array_equal(gen.ids, io["greedy_ids"])
    assert gen.text is None


@pytest.mark.parametrize("unroll", [True, False])
def test_every_step_equals_the_whole_forward_pass(case, unroll):
    lm, io = case
    cfg, new = lm.config, io["greedy_ids"]
    ids = np.concatenate([io["input_ids"], new[:, :-1]], axis=1)
    whole = np.asarray(atom_jax.apply(lm, ids).logits)[:, -48:]
    np.testing.assert_allclose(whole, io["greedy_step_logits"], atol=2e-4)
    p = transformer.decode_params(lm.params, cfg, unroll)
    step = jax.jit(lambda batch, cache: transformer.apply(p, batch, cfg=cfg, cache=cache))
    lengths = np.array([40, 40], np.int32)
    x_bd, cache = reading.first(lm.params, ids[:, :40], lengths, cfg=cfg, capacity=96)
    np.testing.assert_allclose(transformer.logits(p, x_bd[:, None], cfg=cfg)[:, 0], whole[:, 0], atol=1e-4)
    if unroll:
        cache = memory.unstack(cache)
    for i in range(1, 48):
        out, cache = step(Batch(ids[:, 39 + i, None], cache.length[:, None], jnp.ones((2, 1), jnp.int32)), cache)
        np.testing.assert_allclose(out.logits[:, 0], whole[:, i], atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_is_the_same_alone_and_in_a_batch(tiny, temperature):
    lm = tiny
    keys = row_keys(jax.random.key(4), len(PROMPTS))
    together = generate(lm, PROMPTS, 20, temperature, keys)
    assert together.ids == generate(lm, PROMPTS, 20, temperature, jax.random.key(4)).ids
    for r in (0, 1):
        assert generate(lm, [PROMPTS[r]], 20, temperature, keys[r : r + 1]).ids == [together.ids[r]]


def test_the_scanned_layout_of_accelerators_gives_the_same(tiny, monkeypatch):
    expected = generate(tiny, PROMPTS, 20, 1.0).ids
    monkeypatch.setattr(laid_out, "unrolls", lambda lm: False)
    assert generate(dataclasses.replace(tiny), PROMPTS, 20, 1.0).ids == expected


def test_sharded_parameters_give_the_same(tiny):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(tiny.params, sharding.shardings(transformer.spec(tiny.config), mesh))
    lm = dataclasses.replace(tiny, params=placed)
    expected = generate(tiny, PROMPTS[:2], 20, 1.0).ids
    assert generate(lm, PROMPTS[:2], 20, 1.0).ids == expected
    with jax.set_mesh(mesh):
        assert generate(lm, PROMPTS[:2], 20, 1.0).ids == expected


def test_growing_the_cache_changes_nothing(tiny, monkeypatch):
    monkeypatch.setattr(queue, "SHARED", 0)  # rows stay together, so that all caches are those of the longest
    expected = generate(tiny, PROMPTS[:2], 60, 1.0)
    monkeypatch.setattr(session, "LEAST", 16)
    monkeypatch.setattr(module, "ROOM", 1)
    grown = generate(tiny, PROMPTS[:2], 60, 1.0)
    assert grown.ids == expected.ids
    assert grown.stats["kv_reads"] == expected.stats["kv_reads"]
    # 37 + 60 tokens went through caches for 48, 64, 96 and 128.
    # Sliding layers keep a ring of their window.
    cfg, sliding = tiny.config, tiny.config.layer_types.count("sliding")
    per_token = 2 * 4 * 2 * cfg.n_kv_heads * cfg.head_dim
    slots = lambda n: (cfg.n_layers - sliding) * n + sliding * min(n, cfg.sliding_window)  # noqa: E731
    assert 0 < sliding < cfg.n_layers and cfg.sliding_window < 96
    assert grown.stats["kv_bytes"] == slots(96) * per_token and expected.stats["kv_bytes"] == slots(256) * per_token


def test_chunks_of_any_size_change_nothing(tiny, monkeypatch):
    expected = generate(tiny, PROMPTS, 30, 1.0).ids
    monkeypatch.setattr(module, "CHUNK", 7)
    assert generate(tiny, PROMPTS, 30, 1.0).ids == expected


def test_a_sliding_window_hides_what_is_behind_it(golden):
    lm = atom_jax.load(golden / "hf_tiny" / "olmo3")
    one = jax.tree.map(lambda x: x[:1], lm.params["layers"])
    cfg = dataclasses.replace(lm.config, n_layers=1, layer_types=("sliding",), sliding_window=6)
    lm = LM(cfg, {**lm.params, "layers": one}, None)
    tail = [1, 2, 3, 4, 5, 6]
    gen = generate(lm, [[*range(30, 60), *tail], [*range(60, 90), *tail]], 20)
    assert gen.ids[0] == gen.ids[1]
    assert gen.ids[0] != generate(lm, [[*range(30, 60), 1, 2, 3, 4, 9, 6]], 20).ids[0]
    assert gen.stats["kv_reads"] == 2 * 19 * 6


def test_parameters_bound_to_a_device_compile_once(tiny):
    bound = dataclasses.replace(tiny, params=jax.device_put(tiny.params, jax.devices()[0]))
    before = decode.decode._cache_size()
    generate(bound, [[1, 2, 3]], 9, stop="zz" if tiny.tokenizer else ())
    assert decode.decode._cache_size() == before + 1


def test_nothing_recompiles_within_a_bucket(tiny, traced):
    lm = variant(tiny, max_length=250)
    generate(lm, [[1, 2, 3], [4]], 5)
    first = len(traced)
    assert first > 0
    generate(lm, [[9] * 14, [2, 2]], 130)
    generate(lm, [[9] * 16, [2]], 40, 0.7, jax.random.key(1), top_k=5, top_p=0.9, min_p=0.01, stop_ids=[3])
    assert len(traced) == first
    generate(lm, [[9] * 17, [2]], 5)
    assert len(traced) > first


def test_draws_depend_on_the_key_alone(tiny):
    def draw(seed, **options):
        return generate(tiny, PROMPTS[:2], 16, 1.0, jax.random.key(seed), **options).ids

    assert draw(1) == draw(1) != draw(2)
    assert draw(1, top_k=1) == draw(2, top_k=1) == generate(tiny, PROMPTS[:2], 16).ids
    assert generate(tiny, PROMPTS[:2], 16, 1.0, jax.random.PRNGKey(1)).ids == draw(1)


def test_stop_ids_end_their_row_only(tiny):
    free = generate(tiny, PROMPTS, 24, 1.0).ids
    stop = free[1][5]
    gen = generate(tiny, PROMPTS, 24, 1.0, stop_ids=[stop])
    for row, whole in zip(gen.ids, free):
        assert row == (whole[: whole.index(stop)] if stop in whole else whole)
    ended = generate(tiny, [PROMPTS[1]], 24, stop_ids=list(range(96)))
    assert ended.ids == [[]] and ended.stats["kv_reads"] == 0


def test_the_models_own_end_is_a_stop_id(tiny):
    free = generate(tiny, [PROMPTS[0]], 8).ids[0]
    lm = variant(tiny, eos_ids=(free[0],))
    assert generate(lm, [PROMPTS[0]], 8).ids == [[]]
    assert generate(lm, [PROMPTS[0]], 8, stop_ids=()).ids == [free]


@pytest.mark.parametrize("prompts", [["Emma", "Mr. Knightley was"], "Höhe: ", [[1, 2], "", b"x"]])
def test_text_is_what_the_ids_say_and_what_was_streamed(byte_lm, prompts):
    pieces = {}
    gen = generate(byte_lm, prompts, 40, 1.0, on_text=lambda r, s: pieces.setdefault(r, []).append(s))
    assert gen.text == [byte_lm.tokenizer.decode(row) for row in gen.ids]
    assert ["".join(pieces[r]) for r in range(len(gen.ids))] == gen.text
    assert gen.ids == generate(byte_lm, prompts, 40, 1.0).ids


@pytest.mark.parametrize(("cores", "parts"), [(1, 1), (2, 2), (3, 2), (8, 4)])
def test_rows_that_are_dealt_out_to_cores_are_the_same_as_together(byte_lm, monkeypatch, cores, parts):
    prompts = ["Emma", "Mr. Knightley was", "x", "Höhe: "]
    options = {"temperature": 1.0, "key": jax.random.key(5), "stop": ["\x01"]}
    monkeypatch.setattr(queue, "SHARED", 0)
    together = generate(byte_lm, prompts, 60, **options)
    monkeypatch.setattr(queue, "SHARED", 2**20)
    monkeypatch.setattr(queue.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    rows, pieces = collections.defaultdict(int), collections.defaultdict(str)

    def counted(self):
        rows[self.first] = len(self.rows)
        return decode_part(self)

    def heard(row, piece):
        pieces[row] += piece

    decode_part = module._Run.decode
    monkeypatch.setattr(module._Run, "decode", counted)
    apart = generate(byte_lm, prompts, 60, on_text=heard, **options)
    assert len(rows) == parts and sum(rows.values()) == 4 and sorted(rows)[-1] == 4 - 4 // parts
    assert apart.ids == together.ids and apart.text == together.text == [pieces[r] for r in range(4)]
    for name in ("prompt_tokens", "new_tokens", "kv_reads", "kv_bytes"):
        assert apart.stats[name] == together.stats[name], name
    assert apart.stats["kv_entries_peak"] >= together.stats["kv_entries_peak"]


def test_a_later_turn_equals_the_whole_conversation(tiny):
    first = generate(tiny, PROMPTS[:3], max_new_tokens=5, stop_ids=(), keep_memory=True)
    said = [[8, 3, 1], [4], list(range(50, 30, -1))]
    second = generate(tiny, said, max_new_tokens=6, stop_ids=(), keep_memory=True, after=first)
    third = generate(tiny, said, max_new_tokens=4, stop_ids=(), after=second)
    whole = [a + b + c for a, b, c in zip(PROMPTS, first.ids, said)]
    assert second.ids == generate(tiny, whole, max_new_tokens=6, stop_ids=()).ids
    whole = [a + b + c for a, b, c in zip(whole, second.ids, said)]
    assert third.ids == generate(tiny, whole, max_new_tokens=4, stop_ids=()).ids
    assert third.memory is None
    with pytest.raises(AtomError, match="no memory; make it with keep_memory"):
        generate(tiny, said, after=third)
    with pytest.raises(AtomError, match="3 rows, but there are 1"):
        generate(tiny, said[:1], after=second)
    with pytest.raises(AtomError, match="exceed the"):
        generate(tiny, said, max_new_tokens=tiny.config.max_length - 10, after=second)


def test_texts_of_byte_models_begin_with_the_bos(byte_lm):
    assert generate(byte_lm, "abc", 8).ids == generate(byte_lm, [[256, 97, 98, 99]], 8).ids
    assert generate(byte_lm, [""], 8).stats["prompt_tokens"] == 1


def test_prompts_are_read_twice_when_asked(byte_lm):
    ids = list(ByteTokenizer().encode("ab"))
    found = atom_jax.generate(byte_lm, ["ab", "abab"], 3, twice=True)
    wanted = atom_jax.generate(byte_lm, ["abab", "abababab"], 3)
    assert found.ids == wanted.ids and found.stats["prompt_tokens"] == wanted.stats["prompt_tokens"]
    again = [
        atom_jax.generate(byte_lm, [prompt], 3, twice=twice).ids for prompt, twice in ((ids, True), (2 * ids, False))
    ]
    assert again[0] == again[1]


def test_stop_strings_cut_the_text_wherever_they_fall(byte_lm):
    free = generate(byte_lm, ["one", "two"], 60, 1.0, stop_ids=())
    ascii_at = [i for i, c in enumerate(free.text[0]) if c < "\x80" and i > 20]
    stop = free.text[0][ascii_at[0]]
    gen = generate(byte_lm, ["one", "two"], 60, 1.0, stop=stop, stop_ids=())
    for row, text in enumerate(free.text):
        assert gen.text[row] == text.split(stop)[0]
        assert free.ids[row][: len(gen.ids[row])] == gen.ids[row]
    assert gen.stats["new_tokens"] == sum(map(len, gen.ids)) < 120


def test_costs_are_those_of_a_dense_cache(byte_lm):
    prompts, new = [[1] * 5, [2] * 9], 12
    stats = generate(byte_lm, prompts, new, stop_ids=()).stats
    assert stats["prompt_tokens"] == 14 and stats["new_tokens"] == 2 * new
    # The last token chosen is never read by the model.
    assert stats["kv_entries_peak"] == 14 + 2 * (new - 1)
    assert stats["kv_reads"] == sum(p + i for p in (5, 9) for i in range(1, new))
    assert stats["kv_bytes"] == 2 * 2 * 2 * 2 * 256 * 16 * 4
    assert 0 < stats["prefill_seconds"] < stats["seconds"] and stats["tokens_per_second"] > 0


def test_prepared_parameters_follow_the_model(tiny):
    lm = dataclasses.replace(tiny, params=dict(tiny.params))
    prepared = laid_out.of(lm)
    assert laid_out.of(lm) is prepared
    before = generate(lm, [[1, 2]], 8).ids
    lm.params["unembed"] = -lm.params["unembed"]
    assert generate(lm, [[1, 2]], 8).ids != before
    # They go with the model.
    kept = weakref.ref(laid_out.of(lm)["layers"][0][0][0]["attn"]["q"])
    assert kept() is not None
    del lm
    gc.collect()
    assert kept() is None


def test_buckets():
    sizes = sorted({bucket(n) for n in range(1, 1500)})
    assert sizes == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536]
    assert bucket(10, 256) == 256 and all(bucket(n) >= n for n in range(1, 300))


@pytest.mark.parametrize(
    "prompts, options, words",
    [
        ([], {}, "prompts: there is none"),
        ([[]], {}, r"prompts\[0\] is empty"),
        ([[1], 2], {}, r"prompts\[1\]: expected"),
        ([[0.5]], {}, r"prompts\[0\]: expected"),
        ([[96]], {}, "token id 96 is outside the vocabulary of 96"),
        ([[-1]], {}, "token id -1"),
        (["text"], {}, "no tokenizer"),
        ([[1]], dict(stop="x"), "no tokenizer"),
        ([[1]], dict(on_text=print), "no tokenizer"),
        ([[1]], dict(stop_ids=[200]), "a token id of stop_ids is 200"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens is 0"),
        ([[1] * 100], dict(max_new_tokens=157), "100 tokens and max_new_tokens 157 exceed the 256"),
        ([[1]], dict(temperature=-1.0), "temperature"),
        ([[1]], dict(key=jax.random.split(jax.random.key(0), 3)), r"key has shape \[3\]"),
    ],
)
def test_bad_input_is_one_sentence(tiny, prompts, options, words):
    with pytest.raises(AtomError, match=words) as e:
        generate(tiny, prompts, **options)
    assert "\n" not in str(e.value)


def test_what_is_no_model_is_refused():
    for call in (generate, atom_jax.apply, atom_jax.chat, atom_jax.Session.prefill):
        with pytest.raises(AtomError, match=r"lm: expected a model, as atom_jax.load gives it, got 'models/x'"):
            call("models/x", ["a"])


def test_bad_text_is_one_sentence(byte_lm):
    with pytest.raises(AtomError, match="empty string"):
        generate(byte_lm, "x", stop="")
    with pytest.raises(AtomError, match="surrogate"):
        generate(byte_lm, "\ud800")
