"""A tiny experiment, and one batch for it, shared by the tests of training."""

import dataclasses

import jax
import numpy as np

from atom_jax import config
from atom_jax.sharding import MeshConfig, make_mesh
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.training.config import Experiment
from atom_jax.training.program import Program


def make(*settings: str, **fields) -> Experiment:
    """configs/lm.py:tiny on one device, changed."""
    exp = config.override(config.load_file("configs/lm.py:tiny"), ["mesh.data=1", *settings])
    return dataclasses.replace(exp, **fields)


def program(exp: Experiment) -> Program:
    """The compiled parts of `exp` on the first of the simulated devices, or on as many as its mesh asks for."""
    return Program(exp, mesh(exp.mesh), ByteTokenizer())


def mesh(cfg: MeshConfig):
    n = cfg.data * cfg.fsdp * cfg.tensor * cfg.context
    return make_mesh(cfg, jax.devices()[:n])


def batches(exp: Experiment, n: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Random batches whose rows have different numbers of targets."""
    rng = np.random.default_rng(seed)
    b, t = exp.data.batch_size, exp.data.seq_len
    out = []
    for _ in range(n):
        # Few distinct bytes: something to learn within a few steps.
        ids = rng.integers(97, 105, (b, t + 1), dtype=np.int32)
        place = np.broadcast_to(np.arange(t, dtype=np.int32), (b, t))
        mask = place < rng.integers(1, t + 1, (b, 1))
        out.append(
            {
                "ids": ids[:, :-1],
                "positions": place,
                "segments": np.ones((b, t), np.int32),
                "targets": ids[:, 1:],
                "loss_mask": mask,
            }
        )
    return out


def sizes(jaxpr):
    """Elements of every array that a jaxpr and those inside it compute."""
    for eqn in jaxpr.eqns:
        yield from (int(np.prod(v.aval.shape)) for v in eqn.outvars if hasattr(v.aval, "shape"))
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)
