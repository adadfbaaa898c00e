"""Feed-forward layers."""

from __future__ import annotations

import jax

from atom_jax.nn.linear import project
from atom_jax.params import ParamSpec, normal
from atom_jax.sharding import constrain


def swiglu_spec(d: int, f: int, out_scale: float = 1.0) -> dict[str, ParamSpec]:
    """Parameters of `swiglu` for model width d and hidden width f."""
    return {
        "gate": ParamSpec((d, f), ("embed", "mlp"), normal(d**-0.5)),
        "up": ParamSpec((d, f), ("embed", "mlp"), normal(d**-0.5)),
        "down": ParamSpec((f, d), ("mlp", "embed"), normal(out_scale * f**-0.5)),
    }


def swiglu(params: dict[str, jax.Array], x_btd: jax.Array) -> jax.Array:
    """SwiGLU (Shazeer, 2020): (silu(x gate) * (x up)) down; [b, t, d] to [b, t, d] in the dtype of x."""
    gate_btf, up_btf = project(x_btd, params["gate"]), project(x_btd, params["up"])
    return project(constrain(jax.nn.silu(gate_btf) * up_btf, "batch", "length", "mlp"), params["down"])
