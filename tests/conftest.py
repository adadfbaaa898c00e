"""Test set-up: CPU, eight simulated devices, quick compiles and a persistent compilation cache."""

import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from absl import flags

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """Directory of the small reference numbers."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Drops compiled programs after each module: thousands of them in one process exhaust its memory maps, which ends
    in a crash. Those that are needed again come from the persistent cache."""
    yield
    jax.clear_caches()
