"""Chips that programs are compiled for, and what their compilers refuse."""

import importlib.util

import jax
import pytest

from atom_jax.aot import topology
from atom_jax.aot.topology import Chip
from atom_jax.typing import AtomError


@pytest.mark.parametrize(
    "name, words",
    [
        ("v5p:4x4x4x4x4", "expected the kind of chip"),
        ("h100:8", "expected the kind of chip (v5e, v5p, v6e)"),
        ("v5p", "expected the kind of chip"),
        ("cpu:9", "there are 8 simulated devices"),
    ],
)
def test_unknown_topologies(name, words):
    assert len(jax.devices()) == 8
    with pytest.raises(AtomError) as caught:
        topology.devices(name)
    assert words in str(caught.value) and name in str(caught.value)


def test_a_missing_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AtomError, match=r"pip install 'atom-jax\[tpu\]'"):
        topology.devices("v5p:4x4x4")


@pytest.mark.parametrize(
    "words, size",
    [
        ("RESOURCE_EXHAUSTED: ... Used 20.48G of 15.75G hbm. Exceeded", 20.48),
        ("Ran out of memory on HBM, the total memory required for HLO temporaries (17.82G) exceeds available", 17.82),
        ("something else", None),
    ],
)
def test_refused_for_its_size(words, size):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(words)

    if size is None:
        with pytest.raises(AtomError, match="does not compile for v5e:2x2: something else"):
            topology.compiled(Lowered(), "v5e:2x2")
        return
    found = topology.compiled(Lowered(), "v5e:2x2")
    assert found.total == size and found.temporary is None and not found.fits(Chip(16, 1e12))
    assert "of 16: does not fit" in found.verdict(Chip(16, 1e12))
