"""What an NVIDIA GPU runs for attention: what is chosen, without one; and its numbers, with one:

JAX_PLATFORMS=cuda python -m pytest tests/pallas_kernels/test_nvidia_attention.py
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from atom_jax.nn.attention import Tokens, attend
from pallas_kernels import dispatch
from pallas_kernels.evict_attention import nvidia
from pallas_kernels.evict_attention.api import choose, evict_attention
from tests.pallas_kernels.test_evict_attention import documents

needs_gpu = pytest.mark.skipif(
    jax.default_backend() != "gpu" or not dispatch.nvidia(), reason="needs an NVIDIA GPU of Ampere or later"
)


def device(kind):
    """Compiling for such a GPU, which is not there."""
    gpu = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("chip",), axis_types=(AxisType.Auto,), abstract_device=gpu)
    return jax.sharding.use_abstract_mesh(mesh)


H100 = functools.partial(device, "NVIDIA H100 80GB HBM3")


def shapes(t=1024, s=None, k=128, dtype=jnp.bfloat16):
    s = s or t
    return jax.ShapeDtypeStruct((1, 2, 4, t, k), dtype), jax.ShapeDtypeStruct((1, 2, s, k), dtype)


@pytest.mark.parametrize(
    "sizes, options, expected",
    [
        ({}, {"with_lse": False}, "cudnn"),
        ({"k": 96}, {"with_lse": False}, "cudnn"),
        ({"t": 1023}, {"with_lse": False}, "reference"),
        ({"s": 2048}, {"with_lse": False}, "reference"),
        ({}, {"with_lse": False, "segments": True}, "reference"),
        ({}, {"with_lse": False, "offset": True}, "reference"),
        ({}, {"with_lse": False, "keep": True}, "reference"),
        ({"k": 64}, {}, "reference"),
        ({"k": 96}, {}, "reference"),
        ({"k": 129}, {"with_lse": False}, "reference"),
        ({"k": 256}, {"with_lse": False}, "reference"),
        ({"dtype": jnp.float32}, {"with_lse": False}, "reference"),
    ],
)
def test_what_is_chosen(sizes, options, expected):
    arrays = shapes(**sizes)
    with H100():
        assert choose(*arrays, **options) == expected
        assert choose(*arrays, **options, implementation="reference") == "reference"
    assert choose(*arrays, **options) == "reference"


@pytest.mark.parametrize("kind", ["Tesla T4", "AMD Instinct MI300X", "TPU v5 lite", "cpu"])
def test_other_devices_that_are_not_there(kind):
    with device(kind):
        assert not dispatch.nvidia()


@pytest.mark.parametrize("capability, expected", [("7.5", False), ("8.0", True), ("12.0", True), ("gfx942", False)])
def test_devices_that_are_there(monkeypatch, capability, expected):
    here = types.SimpleNamespace(device_kind="NVIDIA GPU", compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [here])
    assert dispatch.nvidia() == expected
    with device("NVIDIA GPU"):
        assert dispatch.nvidia() == expected


def test_cudnn_where_it_does_not_fit():
    q, k = (jnp.zeros(x.shape, x.dtype) for x in shapes(t=8, k=16))
    with pytest.raises(ValueError, match=r"implementation: cuDNN takes bfloat16 .* no keep_bhs, segments"):
        evict_attention(q, k, k, segments=(documents([8]), documents([8])), with_lse=False, implementation="cudnn")
    with pytest.raises(ValueError, match="with_lse=True"):
        evict_attention(q, k, k, implementation="cudnn")


def arrays(t, k, dtype, b=2, h=2, g=3):
    keys = jax.random.split(jax.random.key(t), 4)
    q, weight = (jax.random.normal(key, (b, h, g, t, k)).astype(dtype) for key in keys[:2])
    return q, *(jax.random.normal(key, (b, h, t, k)).astype(dtype) for key in keys[2:]), weight


def both(attention, q, k, v, weight):
    """Attention [b, h, g, t, k], and the gradients of a weighted sum of it in q, k and v."""

    def total(q, k, v):
        out = attention(q, k, v)
        return jnp.sum(out.astype(jnp.float32) * weight.astype(jnp.float32)), out

    gradients, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


@pytest.mark.parametrize("window", [None, 1, 17])
def test_what_cudnn_is_asked_for(window):
    """The same question to jax.nn's own implementation, in float32."""
    x = arrays(40, 16, jnp.float32)
    got = both(lambda q, k, v: nvidia.fused(q, k, v, window, "xla"), *x)
    expected = both(lambda q, k, v: evict_attention(q, k, v, window=window)[0], *x)
    for one, other in zip(got, expected):
        np.testing.assert_allclose(one, other, atol=2e-5)


def places(*rows):
    """Documents of the lengths in each row, the last one of several padding."""
    segments = documents(*rows)
    index = jnp.broadcast_to(jnp.arange(segments.shape[1])[None], segments.shape)
    starts = jnp.where(jnp.diff(segments, axis=1, prepend=-1) != 0, index, 0)
    return Tokens(index - jax.lax.cummax(starts, axis=1), segments)


@pytest.mark.parametrize("window", [None, 90])
def test_single_documents_need_no_segments(window, monkeypatch):
    """The program that runs without them, interpreted, equals the reference with them, padding aside."""
    q, k, v, weight = arrays(600, 16, jnp.float32, h=1, g=1)
    tokens = places([520, 80], [600])
    real = (tokens.segments > 0)[:, None, None, :, None]
    run = lambda **more: both(  # noqa: E731
        lambda q, k, v: attend(q, k, v, tokens, tokens, window=window, aligned=True, **more), q, k, v, weight * real
    )
    expected = run()
    monkeypatch.setattr(dispatch, "DEFAULT", "triton_interpret")
    asked = []

    def ask(*arrays, **options):
        asked.append(options["segments"])
        return evict_attention(*arrays, **options)

    monkeypatch.setattr("atom_jax.nn.blockwise.evict_attention", ask)
    for single in (True, False):
        out, *gradients = run(single=single)
        np.testing.assert_allclose(out * real, expected[0] * real, atol=2e-5)
        for one, other in zip(gradients, expected[1:]):
            np.testing.assert_allclose(one, other, atol=2e-5)
        assert (asked.pop() is None) == single


@pytest.mark.parametrize("many", [False, True])
def test_what_a_layer_runs(many, monkeypatch):
    """Prompts go to cuDNN, what it does not take to plain jnp, and on request to Triton; also under a mesh of several
    GPUs."""
    called = []
    monkeypatch.setattr(nvidia, "fused", lambda q, *rest: called.append("cudnn") or q)
    tokens = jax.tree.map(lambda _: jax.ShapeDtypeStruct((2, 1024), jnp.int32), Tokens(0, 0))

    def program(dtype=jnp.bfloat16, **options):
        q, k = (jax.ShapeDtypeStruct((2, *x.shape[1:]), dtype) for x in shapes())
        keep = jax.ShapeDtypeStruct(k.shape[:3], jnp.float32) if options.pop("keep", False) else None

        def loss(q, k, v, keep, tokens):
            out = attend(q, k, v, tokens, tokens, aligned=True, keep_bhs=keep, **options)
            return jnp.sum(out.astype(jnp.float32))

        return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, k, keep, tokens))

    mesh = H100()
    if many:
        gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
        names = ("data", "fsdp", "context", "tensor")
        mesh = jax.sharding.use_abstract_mesh(
            AbstractMesh((2, 1, 1, 2), names, axis_types=(AxisType.Auto,) * 4, abstract_device=gpu)
        )
    with mesh:
        assert "evict_attention" not in program() and not called
        assert "evict_attention" not in program(single=True, keep=True) and not called
        assert "evict_attention" not in program(jnp.float32, single=True) and not called
        assert "evict_attention" not in program(single=True) and called
        called.clear()
        monkeypatch.setattr(dispatch, "DEFAULT", "triton")
        for options in ({}, {"window": 100}, {"single": True, "keep": True}):
            assert "evict_attention_back_k" in program(**options) and not called
        monkeypatch.undo()
    assert "evict_attention" not in program(single=True) and not called


@needs_gpu
@pytest.mark.parametrize("implementation", ["cudnn", "triton"])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("k", [64, 128])
def test_numbers_of_a_gpu(implementation, window, k):
    x = arrays(1024, k, jnp.bfloat16)
    got = both(
        lambda q, k, v: evict_attention(
            q, k, v, window=window, with_lse=False, implementation=implementation
        )[0], *x
    )  # fmt: skip
    close_to_exact(
        got, both(lambda q, k, v: evict_attention(q, k, v, window=window, implementation="reference")[0], *wide(x))
    )


@needs_gpu
@pytest.mark.parametrize("k", [64, 128])
def test_numbers_of_a_gpu_with_eviction_and_documents(k):
    *x, weight = arrays(1000, k, jnp.bfloat16)
    keep = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.3, x[1].shape[:3]), -jnp.inf, 0.0)
    segments = documents([400, 1, 500, 99], [1000])
    options = {"keep_window": 100, "segments": (segments, segments)}
    run = lambda name, *x: both(  # noqa: E731
        lambda q, k, v: evict_attention(q, k, v, keep, **options, implementation=name)[0], *x
    )
    close_to_exact(run("triton", *x, weight), run("reference", *wide((*x, weight))))


def wide(arrays):
    return [x.astype(jnp.float32) for x in arrays]


def close_to_exact(got, expected):
    for one, exact in zip(got, expected):
        np.testing.assert_allclose(np.float32(one), exact, atol=2e-2 * max(1.0, float(jnp.abs(exact).max())))
