"""All operations' named shapes."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Callable

import jax

Specs = dict[str, tuple[Callable, list[jax.ShapeDtypeStruct]]]


def operations() -> list[str]:
    """Names of the folders that hold an operation."""
    return sorted(path.parent.name for path in pathlib.Path(__file__).parent.glob("*/specs.py"))


def tpu() -> Specs:
    """{"operation/name": (function, shapes)} of what runs on a TPU."""
    return _collect("tpu")


def cuda() -> Specs:
    """The same of what runs on an H100."""
    return _collect("cuda")


def _collect(platform: str) -> Specs:
    found = {}
    for operation in operations():
        specs = importlib.import_module(f"pallas_kernels.{operation}.specs")
        found |= {f"{operation}/{name}": spec for name, spec in getattr(specs, platform)().items()}
    return found
