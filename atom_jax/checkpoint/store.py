"""Checkpoints of training runs and parameter directories, through Orbax. The only file that knows Orbax.

A run:          WORKDIR/checkpoints/STEP/{params,ema,opt,source,data,config}; `ema` only when it keeps an average,
                `source` only in the first stage of byteification
A model alone:  DIR/{params,model.json,tokenizer.json}
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from atom_jax import config, tokenizers
from atom_jax import params as params_lib
from atom_jax.checkpoint.fields import read_json
from atom_jax.models import registry
from atom_jax.params import Tree
from atom_jax.typing import LM, AtomError

MODEL_FILE = "model.json"
TREES, NOTES = ("params", "ema", "opt", "source"), ("data", "config")


class Store:
    """The checkpoints of one run. Saving goes on in the background; unfinished ones are never listed."""

    def __init__(self, directory: pathlib.Path, keep: int):
        # Orbax refuses relative paths, in a background thread.
        self.directory = directory.absolute()
        self._unchecked = False
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        handlers = {name: ocp.StandardCheckpointHandler() for name in TREES}
        handlers |= {name: ocp.JsonCheckpointHandler() for name in NOTES}
        with _sentence(f"{self.directory} cannot be opened"):
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """The newest complete step."""
        # Read from the disk: the manager also counts a step that is being saved or could not be.
        return _latest(self.directory)

    def save(self, step: int, trees: dict[str, Tree], notes: dict[str, Any]) -> None:
        """Starts to save TREES of arrays and JSON-able NOTES; the arrays may be given up when this returns.

        Raises AtomError when this save or the one before fails; earlier checkpoints stay as they are.
        """
        args = {k: ocp.args.StandardSave(v) for k, v in trees.items()}
        args |= {k: ocp.args.JsonSave(v) for k, v in notes.items()}
        with self._saving(f"the checkpoint of step {step} could not be saved"):
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
        self._unchecked = True

    def check(self) -> None:
        """Raises AtomError when a save has failed meanwhile; cheap enough for every step."""
        if self._unchecked and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when everything is on the disk. Raises AtomError when saving failed."""
        self._unchecked = False
        with self._saving("the checkpoint could not be saved"):
            self._manager.wait_until_finished()

    def notes(self, step: int, *names: str) -> list[Any]:
        """The JSON notes of a step."""
        args = ocp.args.Composite(**{k: ocp.args.JsonRestore() for k in names})
        with _sentence(f"{self.directory / str(step)} cannot be read"):
            return [self._manager.restore(step, args=args)[k] for k in names]

    def restore(self, step: int, trees: dict[str, Tree]) -> dict[str, Tree]:
        """Trees of arrays, placed as the ShapeDtypeStructs in `trees` say.

        Raises AtomError for a tensor that is missing or has another shape or dtype.
        """
        where = self.directory / str(step)
        for name, tree in trees.items():
            _compare(tree, _metadata(where / name), f"{where}/{name}")
        args = ocp.args.Composite(**{k: ocp.args.StandardRestore(v) for k, v in trees.items()})
        with _sentence(f"{where} cannot be read"):
            restored = self._manager.restore(step, args=args)
        return {k: restored[k] for k in trees}

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Waits for the last save and raises AtomError when it failed, unless another error is under way."""
        with contextlib.suppress(AtomError) if kind else contextlib.nullcontext(), self._saving("saving failed"):
            self._manager.close()

    @contextlib.contextmanager
    def _saving(self, what: str) -> Iterator[None]:
        with _sentence(f"{self.directory}: {what}", f"; step {self.latest()} is the newest that can be used"):
            yield


def save_model(directory: str | pathlib.Path, lm: LM) -> None:
    """Writes the parameters, the configuration and the tokenizer of a model. Raises AtomError when it exists."""
    path = pathlib.Path(directory).absolute()
    if path.exists() and any(path.iterdir()):
        raise AtomError(f"{path} is not empty")
    with _sentence(f"{path} could not be saved"):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path / "params", lm.params)
        lm.tokenizer.save(path)
        # Last, since this file is what makes the directory a model.
        note = {"model": config.to_json(lm.config), "tokenizer": lm.tokenizer.name}
        (path / MODEL_FILE).write_text(json.dumps(note, indent=1))


def is_checkpoint(path: str | pathlib.Path) -> bool:
    """True for what `load_params` reads."""
    path = pathlib.Path(path)
    return any((path / name).exists() for name in (MODEL_FILE, "checkpoints", "config/metadata"))


def has_begun(workdir: str | pathlib.Path) -> bool:
    """True for the WORKDIR of a run with a complete checkpoint."""
    path = pathlib.Path(workdir) / "checkpoints"
    return path.is_dir() and _latest(path) is not None


def load_config(path: str | pathlib.Path) -> tuple[Any, Any]:
    """(model configuration, tokenizer) of a model directory, a run's WORKDIR or one of its checkpoints."""
    _, note, home = _open(path)
    name = note.get("tokenizer") if isinstance(note, dict) else 0
    if not isinstance(name, str | None) or "model" not in note:
        raise AtomError(f"{path}: its {MODEL_FILE} or config does not say which model and tokenizer it holds")
    model = config.from_json(object, note["model"], f"{path}: model")
    registry.of(model)
    # A run keeps a copy of its tokenizer, whatever became of the original.
    if name != "bytes" and (home / "tokenizer.json").exists():
        return model, tokenizers.from_name(f"bolmo:{home}" if name.startswith("bolmo") else home)
    return model, tokenizers.from_name(name or "bytes")


def load_params(path: str | pathlib.Path, dtype: Any = None, shardings: Any = None) -> tuple[Any, Tree, Any]:
    """(model configuration, parameters, tokenizer) of a model directory, a run's WORKDIR (its newest step) or
    WORKDIR/checkpoints/STEP. Of a run that kept an average of its parameters this is the average.

    dtype: converts while reading (None: as saved); shardings: a tree of them, which may hold
    more (None: on the first device).
    Raises AtomError for anything missing, or a tensor of another shape than the configuration says.
    """
    step, _, _ = _open(path)
    model, tokenizer = load_config(path)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    spec = registry.of(model).spec(model)
    if isinstance(shardings, dict):
        there = params_lib.flatten(shardings)
        places = params_lib.unflatten({name: there[name] for name in params_lib.flatten(spec)})
    else:
        places = params_lib.map_specs(lambda _: shardings, spec)
    found = _metadata(step / "params")
    _compare(params_lib.abstract(spec), found, f"{step}/params", check_dtype=False)
    kinds = params_lib.flatten(found)
    wanted = {
        k: jax.ShapeDtypeStruct(s.shape, dtype or kinds[k].dtype, sharding=s.sharding)
        for k, s in params_lib.flatten(params_lib.abstract(spec, shardings=places)).items()
    }
    averaged = set(params_lib.flatten(_metadata(step / "ema"))) if (step / "ema").exists() else set()
    leaves: dict[str, Any] = {}
    for name, chosen in (("ema", averaged), ("params", set(wanted) - averaged)):
        if chosen:
            leaves |= _restore(step / name, {k: wanted[k] for k in wanted if k in chosen})
    return model, params_lib.unflatten({k: leaves[k] for k in wanted}), tokenizer


def _open(path: str | pathlib.Path) -> tuple[pathlib.Path, dict[str, Any], pathlib.Path]:
    """The directory that holds `params`, the note on model and tokenizer, and the directory of the tokenizer."""
    path = pathlib.Path(path).absolute()
    if (path / MODEL_FILE).exists():
        return path, read_json(path / MODEL_FILE), path
    if (path / "checkpoints").is_dir():
        step = _latest(path / "checkpoints")
        if step is None:
            raise AtomError(f"{path / 'checkpoints'} holds no complete checkpoint")
        path = path / "checkpoints" / str(step)
    if not (path / "config").is_dir() or not (path / "params").is_dir():
        raise AtomError(f"{path} is neither a training workdir nor one of its checkpoints")
    with _sentence(f"{path / 'config'} cannot be read"), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return path, reader.restore(path / "config", args=ocp.args.JsonRestore()), path.parent.parent


def _latest(directory: pathlib.Path) -> int | None:
    """The highest step; what is not complete yet has another name."""
    return max((int(p.name) for p in directory.iterdir() if p.name.isdigit()), default=None)


def _metadata(path: pathlib.Path) -> Tree:
    with _sentence(f"{path} cannot be read"):
        return ocp.StandardCheckpointHandler().metadata(epath.Path(path)).tree


def _restore(path: pathlib.Path, wanted: dict[str, Any]) -> dict[str, Any]:
    target = params_lib.unflatten(wanted)
    args = ocp.args.PyTreeRestore(
        target, partial_restore=True, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
    )
    with _sentence(f"{path} cannot be read"), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return params_lib.flatten(reader.restore(path, args=args))


def _compare(wanted: Tree, found: Tree, where: str, check_dtype: bool = True) -> None:
    """Raises AtomError for the first tensor that is missing, left over, or of another shape or dtype."""
    a, b = _by_name(wanted), _by_name(found)
    for name in sorted(set(a) ^ set(b)):
        raise AtomError(f"{where}: {name} is {'missing' if name in a else 'not part of this model'}")
    for name, leaf in a.items():
        other = b[name]
        if tuple(leaf.shape) != tuple(other.shape) or (check_dtype and leaf.dtype != other.dtype):
            raise AtomError(
                f"{where}: {name} is {other.dtype}{list(other.shape)}, expected {leaf.dtype}{list(leaf.shape)}"
            )


def _by_name(tree: Tree) -> dict[str, Any]:
    return params_lib.flatten(jax.tree.map(lambda x: x, tree))


@contextlib.contextmanager
def _sentence(what: str, then: str = "") -> Iterator[None]:
    """Turns whatever Orbax, TensorStore or the file system raise into one sentence."""
    try:
        yield
    except AtomError:
        raise
    except Exception as e:
        text = str(e) or type(e).__name__
        # TensorStore wraps "No space left on device" in paragraphs of paths and options.
        known = [os.strerror(n) for n in errno.errorcode]
        reason = next((k for k in known if k in text), text.strip().splitlines()[0][:300])
        raise AtomError(f"{what} ({reason}){then}") from e
