"""Collectives read from compiled programs, with bytes known by hand."""

import jax
import jax.numpy as jnp
import pytest

from atom_jax.aot import hlo


def test_bytes_of_a_program_on_eight_devices():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def body(_, x):
        x = jax.lax.psum(jnp.sin(x), "a")
        x = jax.lax.ppermute(x, "b", [(0, 1), (1, 2), (2, 0)])
        x = jax.lax.all_to_all(x, "b", 1, 0, tiled=True)
        x = jax.lax.all_gather(x, "b", axis=1, tiled=True)
        return jax.lax.psum_scatter(x, "b", tiled=True)

    loop = lambda x: jax.lax.fori_loop(0, 5, body, x)  # noqa: E731
    program = jax.jit(jax.shard_map(loop, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False))
    found = hlo.traffic(program.lower(jax.ShapeDtypeStruct((64, 32), jnp.float32)).compile().as_text())
    x = 64 * 32 * 4
    assert found.bytes == {
        "all-reduce": 5 * 2 * x / 2,
        "collective-permute": 5 * x * 3 / 4,  # three of four send
        "all-to-all": 5 * x * 3 / 4,
        "all-gather": 5 * 4 * x * 3 / 4,
        "reduce-scatter": 5 * 4 * x * 3 / 4,
    }
    assert found.counts == dict.fromkeys(found.bytes, 5) and found.open_loops == 0
    assert found.total == sum(found.bytes.values())


# What the TPU compiler writes: groups as axes of a mesh, a gather in three fusions while products run, sums of which
# every device keeps a part, and loops without a noted number of rounds.
TPU = """HloModule jit_f, is_scheduled=true, num_partitions=16

%begin (p.1: bf16[8,64]) -> (bf16[8,64], bf16[32,64], u32[]) {
  %p.1 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[32,64]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, replica_groups=ROWS, dimensions={0}
  ROOT %c = (bf16[8,64]{1,0}, bf16[32,64]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1)
}

%end (p.2: bf16[8,64]) -> bf16[32,64] {
  %p.2 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.2 = bf16[32,64]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=7, replica_groups=ROWS, dimensions={0}
  ROOT %d = bf16[32,64]{1,0} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (p.3: f32[32,64]) -> f32[2,64] {
  %p.3 = f32[32,64]{1,0} parameter(0)
  %all-reduce.1 = f32[32,64]{1,0} all-reduce(%p.3), channel_id=8, replica_groups=ALL, to_apply=%add
  ROOT %s = f32[2,64]{1,0} dynamic-slice(%all-reduce.1, %zero), dynamic_slice_sizes={2,64}
}

%condition (p.4: (s32[], f32[32,64])) -> pred[] {
  %p.4 = (s32[]{:T(128)}, f32[32,64]{1,0}) parameter(0)
  %bound = s32[]{:T(128)} constant(10)
  %i = s32[]{:T(128)} get-tuple-element(%p.4), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (p.5: (s32[], f32[32,64])) -> (s32[], f32[32,64]) {
  %p.5 = (s32[]{:T(128)}, f32[32,64]{1,0}) parameter(0)
  %f.1 = (bf16[8,64]{1,0}, bf16[32,64]{1,0}, u32[]{:S(2)}) fusion(%p.5), kind=kCustom, calls=%begin
  %f.2 = bf16[32,64]{1,0} fusion(%f.1), kind=kCustom, calls=%end
  ROOT %f.3 = (s32[]{:T(128)}, f32[2,64]{1,0}) fusion(%f.2), kind=kCustom, calls=%all-reduce-scatter.1
}

ENTRY %main (a: f32[32,64], n: s32[]) -> f32[32,64] {
  %a = f32[32,64]{1,0} parameter(0)
  %n = s32[]{:T(128)} parameter(1)
  %three = s32[]{:T(128)} constant(3)
  %copy = s32[]{:T(128)} copy(%FIRST)
  %t = (s32[]{:T(128)}, f32[32,64]{1,0}) tuple(%copy, %a)
  %w = (s32[]{:T(128)}, f32[32,64]{1,0}) while(%t), condition=%condition, body=%body
  ROOT %r = f32[32,64]{1,0} get-tuple-element(%w), index=1
}
"""
TPU = TPU.replace("ROWS", "mesh['x'=4,'y'=4], device_ids=([4,4]T(1,0)) {'y'}")
TPU = TPU.replace("ALL", "mesh['x'=4,'y'=4] {'x','y'}")


def test_what_the_tpu_compiler_writes():
    found = hlo.traffic(TPU.replace("FIRST", "three"))
    assert found.counts == {"all-gather": 7, "reduce-scatter": 7} and found.open_loops == 0
    assert found.bytes == {"all-gather": 7 * 32 * 64 * 2 * 3 / 4, "reduce-scatter": 7 * 32 * 64 * 4 * 15 / 16}


def test_loops_of_unknown_length_are_said():
    found = hlo.traffic(TPU.replace("FIRST", "n"))
    assert found.counts == {"all-gather": 1, "reduce-scatter": 1} and found.open_loops == 1


def test_text_without_a_program():
    with pytest.raises(ValueError, match="no entry computation"):
        hlo.traffic("nothing")
