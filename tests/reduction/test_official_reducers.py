"""Token reduction against the numbers of official codes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from atom_jax import reduction
from atom_jax.reduction import globalcom2, tome
from atom_jax.reduction.blocks import blocks
from atom_jax.reduction.globalcom2 import GlobalCom2
from atom_jax.reduction.hiprune import HiPrune
from atom_jax.reduction.kth import Kth
from atom_jax.reduction.tome import ToMe
from atom_jax.reduction.types import Seen
from tests.nn import timm_vit

reduce = jax.jit(reduction.reduce, static_argnums=0)
scales = jax.jit(globalcom2.scales, static_argnums=0)
scores = jax.jit(globalcom2.scores, static_argnums=(0, 3))
CASES = {"plain": (5, 0), "cls": (5, 1), "dist": (5, 2), "odd": (7, 0), "clamp": (99, 0)}


@pytest.fixture(scope="module")
def merging(golden):
    """Metadata and numbers of ToMe."""
    with safe_open(golden / "reduction" / "tome.safetensors", "np") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in [*file.keys()]}


@pytest.fixture(scope="module")
def pruning(golden):
    """Numbers of HiPrune and GlobalCom2."""
    return load_file(golden / "reduction" / "prune.safetensors")


@functools.partial(jax.jit, static_argnames=("r", "protected"))
def merge_twice(n, r, protected):
    """What the official code's numbers say, by their names."""
    x = n["x"]
    one = reduction.reduce(ToMe(r), Seen(x, n["metric"], protected=protected))
    y, size = reduction.apply(x, None, one)
    two = reduction.reduce(ToMe(3), Seen(y, n["metric2"], protected=protected))
    z, size2 = reduction.apply(y, size, two)
    found = {"merged": y, "mean": y, "merged2": z, "unmerged": reduction.expand(y, one)}
    exact = {
        "size": size[..., None], "size2": size2[..., None], "source": reduction.source(one),
        "source2": reduction.source(reduction.trace(one, two)), "amax": reduction.largest(x, one),
    }  # fmt: skip
    return found, exact


@pytest.mark.parametrize("name", CASES)
def test_two_merges_in_a_row_are_tomes(merging, name):
    n = {k.removeprefix(f"{name}."): v for k, v in merging[1].items() if k.startswith(f"{name}.")}
    r, protected = CASES[name]
    found, exact = jax.device_get(merge_twice(n, r, protected))
    for key in n.keys() & found.keys():
        np.testing.assert_allclose(found[key], n[key], atol=1e-5)
    for key, values in exact.items():
        np.testing.assert_array_equal(values, n[key])


def test_every_kth_is_tomes(merging):
    n = {k.removeprefix("kth."): jnp.asarray(v) for k, v in merging[1].items() if k.startswith("kth.")}

    @jax.jit
    def run(x, metric):
        found = reduction.reduce(Kth(3), Seen(x, metric))
        y, _ = reduction.apply(x, None, found)
        return y, reduction.expand(y, found)

    for found, name in zip(run(n["x"], n["metric"]), ("merged", "unmerged")):
        np.testing.assert_allclose(found, n[name], atol=1e-5)


def test_schedules_are_tomes(merging):
    for key, expected in json.loads(merging[0]["parse_r"]).items():
        layers, r, inflection = key.split(",")
        assert tome.schedule(int(layers), int(r), float(inflection)) == tuple(expected), key


@pytest.mark.parametrize(
    ("name", "inflection", "proportional"), [("r12", 0, True), ("r12_noprop", 0, False), ("dec", -1, True)]
)
def test_a_vision_transformer_with_merging_is_theirs(golden, merging, name, inflection, proportional):
    w = load_file(golden / "vision" / "vit.safetensors")
    reducers = tuple(ToMe(r) if r else None for r in tome.schedule(4, 12, inflection))

    @jax.jit
    def run(embed, layers, image):
        x = timm_vit.embed(embed, image)
        return blocks(layers, x, reducers, timm_vit.EPS, protected=1, proportional=proportional)

    found = run(*timm_vit.parameters(w), jnp.asarray(w["image"]).transpose(0, 2, 3, 1))
    np.testing.assert_allclose(timm_vit.logits(w, found.x), merging[1][f"vit.{name}.logits"], atol=1e-5)
    np.testing.assert_array_equal(found.size[..., None], merging[1][f"vit.{name}.size"])
    np.testing.assert_array_equal(reduction.source(found.trace), merging[1][f"vit.{name}.source"])


@pytest.mark.parametrize("name", ["n64", "n192", "n128_a50"])
def test_hiprune_keeps_theirs(pruning, name):
    n = {k.removeprefix(f"hiprune.{name}."): v for k, v in pruning.items() if f".{name}." in k}
    m, alpha = int(n["n_alpha"][0]), float(n["n_alpha"][1])
    seen = Seen(jnp.zeros((1, 576, 1)), attention=np.stack([n["object"], n["deep"]], axis=1), grid=(24, 24))
    cfg = HiPrune(m, alpha, object_layer=0, deep_layer=1, wrap=True)
    found = jax.device_get(reduce(cfg, seen))
    np.testing.assert_array_equal(found.slot < m, n["keep"] > 0)
    assert found.size.sum() == m


@pytest.mark.parametrize(("name", "crops"), [("g22", (2, 2)), ("g31", (1, 3))])
def test_globalcom2_keeps_theirs(pruning, name, crops):
    n = {k.removeprefix(f"globalcom2.{name}."): v for k, v in pruning.items() if f".{name}." in k}
    (rows, columns), thumbnail = crops, n["base"].reshape(1, 24, 24)
    grid = (24 * rows, 24 * columns)
    official, ours = GlobalCom2(0.25, 10.0, rows, columns), GlobalCom2(rows=rows, columns=columns)
    np.testing.assert_allclose(scales(official, thumbnail)[0], n["scales"], atol=1e-6)
    np.testing.assert_allclose(scales(ours, thumbnail)[0], n["scales_t005"], atol=1e-6)
    score = np.asarray(scores(official, n["local"][None], thumbnail, grid)[0])
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(score, unit(n["local"]) + unit(n["global"]), atol=1e-5)
    expected = np.zeros(score.shape, bool)
    for i, one in enumerate(score):
        kept = n[f"kept{i}"]
        expected[i, kept] = True
        np.testing.assert_array_equal(np.argsort(-one, kind="stable")[: len(kept)], kept)
    own, keep = (
        x.reshape(rows, columns, 24, 24).transpose(0, 2, 1, 3).reshape(1, -1) for x in (n["local"], expected)
    )
    found = jax.device_get(reduce(official, Seen(jnp.zeros((*own.shape, 1)), None, own[:, None], thumbnail, grid)))
    np.testing.assert_array_equal(found.slot < found.m, keep)
    unused = found.m - int(expected.sum())
    assert (found.size == 0).sum() == unused and unused < rows * columns
