"""Causal attention whose keys are evicted softly or outright once they are far enough back.

Dynamic Memory Sparsification (Łańcucki et al., arXiv 2506.05345, section 3): log(1 - p) of evicting a key is added to
the scores that it gets from queries beyond a window.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.dispatch import check_kind, check_shape, pad_axis
from pallas_kernels.evict_attention import kernel, kernel_bwd, nvidia, plan, ref, tuning
from pallas_kernels.evict_attention.ref import NEGATIVE, NOTHING
from pallas_kernels.evict_attention.tiles import LOG2E, Form
from pallas_kernels.evict_attention.tuning import Blocks

# What there is besides what every operation has.
MORE = ("triton", "triton_interpret", "cudnn")


def choose(
    q_bhgtk: jax.Array,
    k_bhsk: jax.Array,
    *,
    keep: bool = False,
    segments: bool = False,
    offset: bool = False,
    with_lse: bool = True,
    implementation: str | None = None,
) -> str:
    """What `evict_attention` runs for such arrays: `implementation` where it is given, else the kernel on TPU, cuDNN
    on an NVIDIA GPU (`dispatch.nvidia`) where it takes them, and the reference elsewhere.

    keep, segments: whether they are given; offset: whether `q_start` is anything but 0; with_lse: as there. Raises
    ValueError for an unknown name, and for "cudnn" where it does not take this.
    """
    wanted = nvidia.Wanted(
        q_bhgtk.shape[3], k_bhsk.shape[2], q_bhgtk.shape[4], q_bhgtk.dtype, keep, segments, offset, with_lse
    )
    chosen = dispatch.choose(implementation, MORE)
    if chosen == "reference" and implementation is None and dispatch.DEFAULT is None and dispatch.nvidia():
        return nvidia.choose(wanted)
    if chosen == "cudnn" and not nvidia.cudnn_takes(wanted):
        raise ValueError(
            "implementation: cuDNN takes bfloat16 sequences of one even length, heads of a multiple of 8 up to 128, "
            f"and no keep_bhs, segments, q_start or log-sum-exp, got {wanted}"
        )
    return chosen


def evict_attention(
    q_bhgtk: jax.Array,
    k_bhsk: jax.Array,
    v_bhsk: jax.Array,
    keep_bhs: jax.Array | None = None,
    *,
    keep_window: int = 0,
    window: int | None = None,
    segments: tuple[jax.Array, jax.Array] | None = None,
    q_start: int | jax.Array = 0,
    with_lse: bool = True,
    implementation: str | None = None,
    blocks: Blocks | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Softmax attention with scores over sqrt(k), and the log-sum-exp of the scores; memory linear in t and s.

    Query i stands at q_start + i, key j at j. A query sees the keys of its own segment that are not after it.

    Args:
      q_bhgtk: bf16 or f32, queries of g heads for each of the h key/value heads. k_bhsk, v_bhsk: the same dtype.
      keep_bhs: added to the scores that a key gets from queries more than `keep_window` places after it, 0 or less;
        -1e30 and below: the key is not seen at all from there. None: every key is kept.
      window: a query sees only keys fewer than `window` places back (None: all).
      segments: i32 [b, t] of queries and [b, s] of keys, 0 or less for padding, which sees nothing and is not seen.
        Tokens of one segment should stand together, or time is lost. None: one segment.
      q_start: where the first query stands, one integer or i32 [b]. May be negative.
      with_lse: False leaves out the second result, which cuDNN does not give.
      implementation: "reference", "tpu", "interpret" (the TPU kernel's program on any machine), for NVIDIA GPUs
        "triton" and "cudnn", "triton_interpret", or None: see `choose`. Chosen while tracing.
      blocks: sizes of the kernel's blocks, None for those of `tuning`.
    Returns: [b, h, g, t, k] in the dtype of the queries, and f32 [b, h, g, t] in nats. Queries that see nothing get
      zeros and -1e30. Two parts of the keys are merged by weights exp(lse - the larger lse), or -1e30 as the larger
      where both are empty. Differentiable in q, k, v and keep_bhs, through both results.
    Raises: ValueError for other shapes or dtypes.
    """
    check_shape("q_bhgtk", q_bhgtk, (None,) * 5)
    b, h, g, t, k = q_bhgtk.shape
    check_shape("k_bhsk", k_bhsk, (b, h, None, k))
    check_shape("v_bhsk", v_bhsk, k_bhsk.shape)
    s = k_bhsk.shape[2]
    for name, x in (("q_bhgtk", q_bhgtk), ("k_bhsk", k_bhsk), ("v_bhsk", v_bhsk)):
        if x.dtype != q_bhgtk.dtype or x.dtype not in (jnp.bfloat16, jnp.float32):
            raise ValueError(
                f"{name}: expected bfloat16 or float32, the same as the queries' {q_bhgtk.dtype}, got {x.dtype}"
            )
    if 0 in q_bhgtk.shape or s == 0:
        raise ValueError(
            f"q_bhgtk, k_bhsk: expected no axis of length 0, got {list(q_bhgtk.shape)} and {list(k_bhsk.shape)}"
        )
    if keep_bhs is not None:
        check_shape("keep_bhs", keep_bhs, (b, h, s))
        check_kind("keep_bhs", keep_bhs, jnp.floating)
    if segments is not None:
        for name, x, n in (("segments[0]", segments[0], t), ("segments[1]", segments[1], s)):
            check_shape(name, x, (b, n))
            check_kind(name, x, jnp.integer)
    start = jnp.asarray(q_start)
    check_kind("q_start", start, jnp.integer)
    check_shape("q_start", start, (b,) if start.ndim else ())
    if keep_window < 0 or (window is not None and window < 1):
        raise ValueError(f"keep_window, window: expected 0 or more and 1 or more, got {keep_window} and {window}")
    start_b = jnp.broadcast_to(start.astype(jnp.int32), (b,))
    keep, apart, offset = keep_bhs is not None, segments is not None, not (isinstance(q_start, int) and q_start == 0)
    chosen = choose(
        q_bhgtk, k_bhsk, keep=keep, segments=apart, offset=offset, with_lse=with_lse, implementation=implementation
    )
    if chosen == "cudnn":
        return nvidia.fused(q_bhgtk, k_bhsk, v_bhsk, window), None
    if chosen == "reference":
        out, lse = ref.attention(q_bhgtk, k_bhsk, v_bhsk, keep_bhs, segments, start_b, window, keep_window)
        return out, lse if with_lse else None
    triton = chosen.startswith("triton")
    blocks = blocks or (tuning.TRITON if triton else tuning.blocks(t, s, g, q_bhgtk.dtype))
    form = Form(s, window, keep_window, apart, keep, blocks, triton, chosen.endswith("interpret"))
    out, lse = _attend(q_bhgtk, k_bhsk, v_bhsk, keep_bhs, segments, start_b, form)
    return out, lse if with_lse else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, keep, segments, start, form):
    return _forward(q, k, v, keep, segments, start, form)[0]


def _forward(q, k, v, keep, segments, start, form):
    t = q.shape[3]
    out, lse = _kernels(form)[0](*_padded(q, k, v, keep, segments, start, form), form)
    out, lse = out[:, :, :, :t], lse[:, :, :, :t]
    return (out, lse), (q, k, v, keep, segments, start, out, lse)


def _backward(form, saved, gradients):
    q, k, v, keep, segments, start, out, lse = saved
    d_out, d_lse = gradients
    t, s = q.shape[3], k.shape[2]
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    lse = jnp.where(lse > NOTHING, lse * LOG2E, -NEGATIVE)
    block = form.blocks.q_block
    rows = (pad_axis(d_out, 3, block), pad_axis(lse, 3, block, -NEGATIVE), pad_axis(delta, 3, block))
    qkv, rest = (x := _padded(q, k, v, keep, segments, start, form))[:3], x[3:]
    d_q, d_k, d_v, *d_keep = _kernels(form)[1](*qkv, *rows, *rest, form)
    d_q = (d_q[:, :, :, :t] * q.shape[4] ** -0.5).astype(q.dtype)
    d_keep = d_keep[0][:, :, 0, :s].astype(keep.dtype) if d_keep else None
    return d_q, d_k[:, :, :s], d_v[:, :, :s], d_keep, None, None


_attend.defvjp(_forward, _backward)


def _kernels(form):
    """The forward and the backward kernel."""
    if form.triton:
        from pallas_kernels.evict_attention import kernel_triton

        return kernel_triton.forward, kernel_triton.backward
    return kernel.forward, kernel_bwd.backward


def _padded(q, k, v, keep, segments, start, form):
    """The kernels' inputs: whole blocks, and scores in units of log 2."""
    h, t, size = q.shape[1], q.shape[3], q.shape[4]
    q_block, k_block = form.blocks.q_block, form.blocks.k_block
    scaled = (q.astype(jnp.float32) * (LOG2E * size**-0.5)).astype(q.dtype)
    q, k, v = pad_axis(scaled, 3, q_block), pad_axis(k, 2, k_block), pad_axis(v, 2, k_block)
    if keep is not None:
        keep = pad_axis(jnp.maximum(keep.astype(jnp.float32), NEGATIVE), 2, k_block, NEGATIVE)
    if segments is not None:
        # Padding of queries must not equal that of keys.
        q_seg, k_seg = (jnp.where(x > 0, x, no).astype(jnp.int32) for x, no in zip(segments, (-1, 0)))
        segments = pad_axis(q_seg, 1, q_block, -1), pad_axis(k_seg, 1, k_block)
    scalars = plan.make(start, t, form.s, segments, keep, h, form.window, form.keep_window, form.blocks)
    if keep is not None:
        keep = keep[:, :, None] * LOG2E
    if segments is not None:
        segments = tuple(x[:, None] for x in segments)
    return q, k, v, keep, segments, scalars
