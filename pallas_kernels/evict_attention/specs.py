"""Shapes at which `evict_attention` is compiled: training and prefill of an 8B model (32 heads in 8 groups, head size
128, a window of 512), and of a small one (9 heads in 3 groups, head size 64); and JAX's own kernel for TPU for
comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from pallas_kernels.evict_attention.api import evict_attention

Specs = dict[str, tuple[Callable, list[jax.ShapeDtypeStruct]]]


class Case(NamedTuple):
    """Sizes of one call. part: the queries are the last t of s places, known only when the program runs."""

    t: int
    s: int
    h: int = 8
    g: int = 4
    k: int = 128
    b: int = 1
    dtype: str = "bfloat16"
    keep_window: int | None = 512
    window: int | None = None
    packed: bool = False
    part: bool = False

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        b, h, g, t, s, k = self.b, self.h, self.g, self.t, self.s, self.k
        shapes = {"q_bhgtk": (b, h, g, t, k), "k_bhsk": (b, h, s, k), "v_bhsk": (b, h, s, k)}
        found = {name: jax.ShapeDtypeStruct(shape, self.dtype) for name, shape in shapes.items()}
        if self.keep_window is not None:
            found["keep_bhs"] = jax.ShapeDtypeStruct((b, h, s), jnp.float32)
        if self.packed:
            found |= {name: jax.ShapeDtypeStruct((b, n), jnp.int32) for name, n in (("q_seg", t), ("k_seg", s))}
        if self.part:
            found["q_start"] = jax.ShapeDtypeStruct((b,), jnp.int32)
        return found

    def call(self, implementation: str | None) -> Callable:
        """The function of the arrays of `shapes`, in their order."""
        names = list(self.shapes())

        def run(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            options = dict(zip(names, arrays))
            if self.packed:
                options["segments"] = options.pop("q_seg"), options.pop("k_seg")
            options |= {"keep_window": self.keep_window or 0, "window": self.window}
            options["with_lse"] = implementation != "cudnn"
            return evict_attention(**options, implementation=implementation)

        return run


CASES = {
    "8b": Case(2048, 2048),
    "8b_dense": Case(2048, 2048, keep_window=None),
    "8b_packed": Case(2048, 2048, packed=True),
    "8b_sliding": Case(8192, 8192, keep_window=None, window=1024),
    "8b_part": Case(2048, 8192, part=True),
    "8b_f32": Case(2048, 2048, dtype="float32", packed=True),
    "small_packed": Case(2000, 2000, h=3, g=3, k=64, b=32, packed=True),
    "8b_long": Case(131072, 131072),
}


def _specs(implementation: str, names: list[str]) -> Specs:
    specs: Specs = {}
    for name in names:
        case, shapes = CASES[name], list(CASES[name].shapes().values())
        run = case.call(implementation)
        specs[name] = run, shapes
        specs[f"{name}_grad"] = _gradient(run, 3 + (case.keep_window is not None)), shapes
    return specs


def _gradient(run: Callable, n: int) -> Callable:
    """Both results of `run` and the gradients of their sum in its first n arguments."""

    def total(*arrays: jax.Array) -> tuple:
        out, lse = run(*arrays)
        return jnp.sum(out.astype(jnp.float32)) + (0.0 if lse is None else jnp.sum(lse)), (out, lse)

    return jax.grad(total, argnums=tuple(range(n)), has_aux=True)


def _splash(case: Case) -> Callable:
    """JAX's splash attention, which knows no eviction: output and log-sum-exp."""
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((case.t, case.s))] * case.h * case.g)
    names = "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq"
    sizes = splash_attention.BlockSizes(**{f"block_{name}": 512 for name in names.split()})

    def run(q_bhgtk: jax.Array, k_bhsk: jax.Array, v_bhsk: jax.Array) -> tuple[jax.Array, jax.Array]:
        attend = splash_attention.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
        q = q_bhgtk.reshape(case.b, case.h * case.g, case.t, case.k)
        return jax.vmap(attend)(q, k_bhsk, v_bhsk), jnp.zeros(())

    return run


def tpu() -> Specs:
    """{name: (function, shapes)} of the kernel, forward and with gradients, and of JAX's."""
    case = CASES["8b_dense"]
    run, shapes = _splash(case), list(case.shapes().values())
    return _specs("tpu", list(CASES)) | {"jax_8b": (run, shapes), "jax_8b_grad": (_gradient(run, 3), shapes)}


def cuda() -> Specs:
    """The same of what runs on an H100 in bfloat16, cuDNN or the Triton kernel, and of the reference."""
    names = {
        "reference": ["8b", "8b_dense", "8b_packed", "8b_sliding", "small_packed"],
        "triton": [name for name, case in CASES.items() if case.dtype == "bfloat16"],
        "cudnn": ["8b_dense", "8b_sliding"],
    }
    specs = _specs("reference", names.pop("reference"))
    return specs | {f"{kind}_{n}": x for kind, some in names.items() for n, x in _specs(kind, some).items()}
