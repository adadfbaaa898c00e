import contextlib
import resource
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from atom_jax import params as params_lib
from atom_jax import sharding
from atom_jax.checkpoint import store
from atom_jax.models import transformer
from atom_jax.sharding import MeshConfig
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM, AtomError

CFG = transformer.TransformerConfig(d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=24)
NOTES = {
    "config": {"model": {"kind": "TransformerConfig", "d_model": 4}, "tokenizer": "bytes"},
    "data": {"next": [3]},
}


def trees(scale: float = 1.0):
    params = {"a": {"w": scale * jnp.arange(32.0).reshape(4, 8)}, "b": jnp.ones(3, jnp.bfloat16)}
    return {"params": params, "opt": {"opt": optax.adamw(1e-3).init(params), "step": jnp.int32(7)}}


def abstract(tree):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def test_round_trip_keeps_types_and_bits(tmp_path):
    with store.Store(tmp_path / "c", keep=2) as s:
        assert s.latest() is None
        for step in (1, 2, 3):
            s.save(step, trees(step), NOTES)
        s.wait()
        assert s.latest() == 3 and not (tmp_path / "c" / "1").exists()
    with store.Store(tmp_path / "c", keep=2) as s:
        assert s.notes(3, "data", "config") == [NOTES["data"], NOTES["config"]]
        got = s.restore(3, abstract(trees()))
        assert type(got["opt"]["opt"][0]) is type(trees()["opt"]["opt"][0])
        chex.assert_trees_all_equal(got, trees(3))
        chex.assert_trees_all_equal_dtypes(got, trees())


def test_a_relative_directory_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import pathlib

    with store.Store(pathlib.Path("run/checkpoints"), keep=1) as s:
        s.save(1, trees(), NOTES)
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    with store.Store(tmp_path / "c", keep=2) as s:
        x = jnp.arange(1_000_000.0)
        s.save(1, {"params": {"x": x}}, NOTES)
        jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(x)
        s.wait()
        got = s.restore(1, {"params": abstract({"x": jnp.zeros(1_000_000)})})
        np.testing.assert_array_equal(got["params"]["x"], np.arange(1_000_000.0))


def test_another_mesh(tmp_path):
    x = jnp.arange(64.0).reshape(8, 8)

    def place(cfg: MeshConfig, spec: P):
        return NamedSharding(sharding.make_mesh(cfg), spec)

    with store.Store(tmp_path / "c", keep=1) as s:
        before = place(MeshConfig(data=1, fsdp=4, tensor=2), P("fsdp", "tensor"))
        s.save(1, {"params": {"x": jax.device_put(x, before)}}, NOTES)
        s.wait()
        after = place(MeshConfig(data=1, fsdp=2, tensor=4), P("tensor", "fsdp"))
        got = s.restore(1, {"params": {"x": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=after)}})["params"][
            "x"
        ]
    assert got.sharding == after
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda p: p["a"].update(w=jnp.zeros((4, 9))), r"a/w is float32\[4, 8\], expected float32\[4, 9\]"),
        (lambda p: p.update(b=jnp.ones(3)), r"b is bfloat16\[3\], expected float32\[3\]"),
        (lambda p: p.update(c=jnp.ones(3)), "params: c is missing"),
        (lambda p: p.pop("b"), "params: b is not part of this model"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, words):
    with store.Store(tmp_path / "c", keep=1) as s:
        s.save(5, trees(), NOTES)
        s.wait()
        wanted = abstract(trees()["params"])
        change(wanted)
        with pytest.raises(AtomError, match=words):
            s.restore(5, {"params": wanted})


def test_half_written_checkpoints_are_ignored(tmp_path):
    with store.Store(tmp_path / "c", keep=3) as s:
        s.save(1, trees(), NOTES)
        s.save(2, trees(2), NOTES)
    # What a kill in the middle of a save leaves behind.
    shutil.move(tmp_path / "c" / "2", tmp_path / "c" / "2.orbax-checkpoint-tmp")
    shutil.rmtree(tmp_path / "c" / "2.orbax-checkpoint-tmp" / "opt")
    with store.Store(tmp_path / "c", keep=3) as s:
        assert s.latest() == 1
        chex.assert_trees_all_equal(s.restore(1, abstract(trees())), trees())
        s.save(2, trees(2), NOTES)
        s.wait()
        assert s.latest() == 2


@contextlib.contextmanager
def largest_file(size: int):
    """Writing more than `size` bytes into a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_sentence_and_keeps_the_last_checkpoint(tmp_path):
    noise = {"params": {"x": jax.random.normal(jax.random.key(0), (200_000,))}}
    with pytest.raises(AtomError) as caught, store.Store(tmp_path / "c", keep=1) as s:
        s.save(1, noise, NOTES)
        s.wait()
        with largest_file(10_000):
            s.save(2, noise, NOTES)
            s.wait()
    text = str(caught.value)
    assert "File too large" in text and "step 1 is the newest that can be used" in text and "\n" not in text
    with store.Store(tmp_path / "c", keep=1) as s:
        assert s.latest() == 1
        chex.assert_trees_all_equal(s.restore(1, abstract(noise)), noise)
        s.save(2, noise, NOTES)
        s.wait()
        assert s.latest() == 2


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM(CFG, params_lib.init(jax.random.key(0), transformer.spec(CFG)), ByteTokenizer())


def test_models_alone(tmp_path, lm):
    store.save_model(tmp_path / "m", lm)
    assert store.is_checkpoint(tmp_path / "m")
    cfg, params, tokenizer = store.load_params(tmp_path / "m")
    assert cfg == CFG and tokenizer.name == "bytes"
    chex.assert_trees_all_equal(params, lm.params)
    _, half, _ = store.load_params(tmp_path / "m", dtype=jnp.bfloat16)
    chex.assert_trees_all_equal(half, params_lib.cast(lm.params, jnp.bfloat16))
    places = sharding.shardings(transformer.spec(CFG), sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=4)))
    _, spread, _ = store.load_params(tmp_path / "m", shardings=places)
    chex.assert_trees_all_equal(spread, lm.params)
    assert spread["embed"].sharding == places["embed"]
    with pytest.raises(AtomError, match="is not empty"):
        store.save_model(tmp_path / "m", lm)


def test_a_run_is_read_without_its_optimiser_and_with_its_average(tmp_path, lm):
    from atom_jax import config

    average = {"embed": lm.params["embed"] + 1}
    notes = {"config": {"model": config.to_json(CFG), "tokenizer": "bytes"}, "data": {}}
    with store.Store(tmp_path / "checkpoints", keep=2) as s:
        s.save(3, {"params": lm.params, "opt": {"step": jnp.int32(3)}}, notes)
        s.save(4, {"params": lm.params, "opt": {"step": jnp.int32(3)}, "ema": average}, notes)
    shutil.rmtree(tmp_path / "checkpoints" / "4" / "opt")
    chex.assert_trees_all_equal(store.load_params(tmp_path)[1], lm.params | average)
    chex.assert_trees_all_equal(store.load_params(tmp_path / "checkpoints" / "3")[1], lm.params)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves an event loop behind
@pytest.mark.parametrize("broken", ["empty", "no steps", "no params", "other model", "damaged"])
def test_what_is_no_checkpoint_is_named(tmp_path, lm, broken):
    path = tmp_path / "m"
    if broken == "empty":
        path.mkdir()
        assert not store.is_checkpoint(path)
    elif broken == "no steps":
        (path / "checkpoints").mkdir(parents=True)
    else:
        store.save_model(path, lm)
    if broken == "no params":
        shutil.rmtree(path / "params")
    if broken == "other model":
        text = (path / store.MODEL_FILE).read_text()
        (path / store.MODEL_FILE).write_text(text.replace('"d_model": 16', '"d_model": 32'))
    if broken == "damaged":
        for file in (path / "params").rglob("*"):
            if file.is_file() and file.parent.name == "d":
                file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(AtomError, match=str(path)) as caught:
        store.load_params(path)
    assert "\n" not in str(caught.value)
