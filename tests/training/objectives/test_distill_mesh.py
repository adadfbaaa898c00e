"""A retrofit whose rows, heads, vocabulary and positions are spread over devices equals one on a single device."""

import dataclasses

import jax
import numpy as np

from atom_jax.kvcache.dms import DMS
from atom_jax.training.objectives import Distill
from configs.dms import adapters_only
from tests.training.tiny import batches, make, mesh, program


def retrofit(*settings: str):
    """Metrics of two steps of a model with evictors that evict half of the time."""
    exp = make(*settings)
    memory = DMS(form="adapter", window=4, scale=1.0, offset=0.0, tau=1.0)
    model = dataclasses.replace(exp.model, layer_types=(), memory=memory)
    distill = Distill(direction="reverse", cr_start=4.0, cr_end=8.0, cr_steps=10)
    exp = dataclasses.replace(exp, model=model, distill=distill, optim=adapters_only(learning_rate=0.1))
    with jax.set_mesh(mesh(exp.mesh)):
        p, out = program(exp), []
        state = p.initial()
        for batch in batches(exp, 2):
            state, metrics = p.step(state, p.put(batch))
            out.append(jax.device_get(metrics))
        return out


def test_eight_devices_equal_one():
    one, many = retrofit(), retrofit("mesh.fsdp=2", "mesh.context=2", "mesh.tensor=2")
    for a, b in zip(one, many):
        assert a["kl"] > 0 and 0.2 < a["evicted"] < 0.8 and a["grad_norm"] > 0
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-4, err_msg=name)
