"""Test set-up: CPU, eight simulated devices, quick compiles and a persistent compilation cache."""

import contextlib
import gc
import os
import pathlib
import shutil
import subprocess
import sys

from tests import quick

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", quick.FLAGS]
).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from absl import flags

# Tracing leaves many objects behind, few of which are garbage.
gc.set_threshold(50_000, 50, 50)
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()


# Files and directories that train, compile large programs or start other processes: `make check` leaves them out.
SLOW = (
    "aot/test_generation.py", "aot/test_training.py", "benchmarks", "checkpoint/test_adapters.py",
    "checkpoint/test_bolmo_1b.py", "checkpoint/test_bolmo_hf.py", "checkpoint/test_dms_checkpoints.py",
    "checkpoint/test_hnet_hf.py", "checkpoint/test_shipped_adapters.py", "chunking/rules/test_own_rule.py",
    "chunking/rules/test_predictor.py", "chunking/rules/test_rule_properties.py",
    "chunking/test_pools_and_upsamplers.py", "configs", "contract/test_every_policy.py", "contract/test_making.py",
    "contract/test_programs.py", "contract/test_reading.py", "data/envs",
    "evaluation/reports/test_fairness.py", "evaluation/reports/test_summary.py",
    "evaluation/reports/test_units_of_text.py", "evaluation/tasks/test_hyper.py", "evaluation/tasks/test_kv.py",
    "evaluation/tasks/test_lasting_eval.py",
    "evaluation/tasks/test_planning.py", "evaluation/test_loglik.py",
    "evaluation/test_run.py", "inference", "kvcache", "lasting/test_lasting_commands.py", "lasting/test_disk.py",
    "lasting/test_disk_refusals.py", "lasting/test_lasting_decoding.py", "lasting/test_needles.py",
    "lasting/test_places.py",
    "lasting/test_lasting_reading.py", "lasting/test_lasting_states.py", "lasting/test_lasting_units.py",
    "lasting/test_paging.py", "models/test_bolmo.py", "models/test_codes.py", "models/test_dynpool.py",
    "models/test_hnet.py", "models/test_image_tokens.py", "models/test_memory_everywhere.py", "models/test_mixers.py",
    "models/test_pixels.py", "models/test_rmt.py", "models/test_units_properties.py",
    "nn/test_fast_weights.py", "nn/test_knn_attention.py", "nn/test_landmark.py", "nn/test_mlstm.py",
    "nn/test_neighbours.py", "nn/test_neural_memory.py", "nn/test_ngrams.py", "nn/test_product_keys.py",
    "nn/test_relative.py", "nn/test_self_attention.py", "nn/test_slots.py", "nn/test_ssd.py", "pallas_kernels",
    "reliability", "serving",
    "reduction/test_official_reducers.py", "reduction/test_reducing_blocks.py",
    "session/test_drafts.py", "session/test_queue.py", "session/test_session.py", "test_eval_script.py",
    "test_flax_bridge.py", "test_image_tokens_run.py", "test_kernels.py", "test_main.py",
    "test_notebooks.py", "test_train_script.py",
    "training/objectives", "training/test_interrupt.py", "training/test_loop.py", "training/test_start.py",
    "training/test_sft.py", "training/test_step.py", "training/test_training_units.py", "transfer",
)  # fmt: skip


# Where random keys are drawn with: that none is used twice is looked at while programs are traced, which takes time.
KEYS = (
    "configs/test_reason.py", "inference/test_generate.py", "inference/test_scaling.py", "nn", "session",
    "test_params.py", "training",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is in SLOW, and has it run first: no process is to be left with it alone."""
    slow = [ROOT / "tests" / name for name in SLOW]
    for item in items:
        if any(item.path.is_relative_to(place) for place in slow):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def wheel_file(tmp_path_factory):
    """The package's wheel, made from a copy of its sources."""
    pytest.importorskip("setuptools", "77", reason="needs the extra: pip install 'atom-jax[dev]'")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("atom_jax", "pallas_kernels", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-build-isolation", "--no-deps", "--quiet", "-w", out]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True)
    return next(out.iterdir())


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """Directory of the small reference numbers."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="module")
def scanned():
    """Layers one after another in a loop, as accelerators have them in generation: they compile in a fraction of the
    time. For tests of what doesn't depend on it."""
    from atom_jax.session import laid_out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laid_out, "unrolls", lambda lm: False)
        yield


@pytest.fixture(scope="module")
def scanned_policies():
    """`scanned`, for models that have cache policies; without one, layers stay apart as they are on a CPU."""
    from atom_jax.session import laid_out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laid_out, "unrolls", lambda lm: lm.config.memory is None)
        yield


@pytest.fixture(scope="module")
def one_device():
    """Runs use the first device alone, which compiles in a fraction of the time. For tests of what doesn't depend on
    how many there are."""
    from atom_jax import sharding

    whole = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda cfg: whole(cfg, jax.devices()[:1]))
        yield


@pytest.fixture(scope="session", autouse=True)
def curves():
    """Runs draw no curves when they end, which takes longer than a few tiny steps, but within `with curves():`."""
    from atom_jax.training import plots

    draw = plots.draw

    @contextlib.contextmanager
    def drawn():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plots, "draw", draw)
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", lambda *_: [])
        yield drawn


@pytest.fixture(scope="module", autouse=True)
def keys_used_once(request: pytest.FixtureRequest):
    """In KEYS, a random key that is used twice is an error."""
    places = [ROOT / "tests" / name for name in KEYS]
    jax.config.update("jax_debug_key_reuse", any(request.path.is_relative_to(place) for place in places))
    yield


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Drops compiled programs after each module: thousands of them in one process exhaust its memory maps, which ends
    in a crash. Those that are needed again come from the persistent cache."""
    yield
    jax.clear_caches()
