"""Which implementation of an operation a trace uses."""

from __future__ import annotations

import re
from typing import Any

import jax

IMPLEMENTATIONS = ("reference", "tpu", "interpret")
# Stands for minus infinity among scores; finite, so that differences and gradients are.
NEGATIVE = -1e30
# What None stands for in `choose`; set by tests only.
DEFAULT: str | None = None


def platform() -> str:
    """The platform that is compiled for: that of the abstract device of the current mesh where it has one (compiling
    for chips that are not there), else that of the default backend."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.platform if device is not None else jax.default_backend()


def nvidia() -> bool:
    """Whether it is compiled for an NVIDIA GPU of compute capability 8.0 (Ampere) or later. Of one that is not there,
    the abstract device of the current mesh, only the name is known; it counts as such."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    here = jax.local_devices()[0]
    if device is not None and device.device_kind != here.device_kind:
        return device.device_kind.startswith("NVIDIA")
    # Another maker's are no numbers.
    capability = re.fullmatch(r"(\d+)\.\d+", str(getattr(here, "compute_capability", "")))
    return capability is not None and int(capability[1]) >= 8


def choose(implementation: str | None, more: tuple[str, ...] = ()) -> str:
    """One of IMPLEMENTATIONS, or of `more` that an operation has; for None the TPU kernel on TPU and the reference
    elsewhere. Raises ValueError for an unknown name."""
    implementation = implementation or DEFAULT
    if implementation is None:
        return "tpu" if platform() == "tpu" else "reference"
    if implementation not in (*IMPLEMENTATIONS, *more):
        raise ValueError(
            f"implementation: expected one of {', '.join((*IMPLEMENTATIONS, *more))} or None, got {implementation!r}"
        )
    return implementation


def check_shape(name: str, x: jax.Array, shape: tuple[int | None, ...]) -> None:
    """Raises ValueError unless x has this shape; None stands for any size."""
    if x.ndim != len(shape) or any(want not in (None, have) for have, want in zip(x.shape, shape)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(x.shape)}")


def check_kind(name: str, x: jax.Array, kind: Any) -> None:
    """Raises ValueError unless the dtype of x is of this kind, as in `jnp.issubdtype`."""
    if not jax.numpy.issubdtype(x.dtype, kind):
        raise ValueError(f"{name}: expected {kind.__name__}, got {x.dtype}")


def pad_axis(x: jax.Array, axis: int, multiple: int, value: Any = 0) -> jax.Array:
    """x with entries of `value` at the end of one axis, up to a multiple."""
    more = -x.shape[axis] % multiple
    if not more:
        return x
    widths = [(0, more if i == axis else 0) for i in range(x.ndim)]
    return jax.numpy.pad(x, widths, constant_values=value)


def round_up(n: int, multiple: int) -> int:
    """The first multiple that is at least n."""
    return -(-n // multiple) * multiple
