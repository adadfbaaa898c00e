"""Checkpoints of training runs and parameter directories, through Orbax. The only file that knows Orbax.

A run:          WORKDIR/checkpoints/STEP/{params,ema,opt,data,config}; `ema` only when it keeps an average. Parameters
                of its objective that are not the model's lie beside them under their own names
A model alone:  DIR/{params,model.json,tokenizer.json}

Both hold checksums of their files, which are verified when they are read.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from atom_jax import config, sharding, tokenizers
from atom_jax import params as params_lib
from atom_jax.checkpoint import checksums
from atom_jax.checkpoint.atomic import staged
from atom_jax.checkpoint.checksums import Damaged
from atom_jax.checkpoint.steps import Newest, complete, steps
from atom_jax.checkpoint.tensors import compare
from atom_jax.fields import read_json
from atom_jax.models import registry
from atom_jax.params import Tree
from atom_jax.typing import FRAMES, LM, AtomError

MODEL_FILE = "model.json"
TREES, NOTES = ("params", "ema", "opt"), ("data", "config")
T = TypeVar("T")


class Store:
    """The checkpoints of one run. Saving goes on in the background; unfinished ones are never listed.

    extra: names of trees besides TREES. Raises AtomError for a name that is taken.
    """

    def __init__(self, directory: pathlib.Path, keep: int, extra: tuple[str, ...] = ()):
        if taken := sorted({*TREES, *NOTES} & {*extra}):
            raise AtomError(f"{directory}: parameters cannot be called {taken[0]} in a checkpoint")
        # Orbax refuses relative paths, in a background thread.
        self.directory = directory.absolute()
        self._extra, self._keep, self._unchecked, self._saving_step = extra, keep, False, 0
        self._manager: ocp.CheckpointManager | None = None

    def latest(self) -> int | None:
        """The newest complete step."""
        # Read from the disk: the manager also counts a step that is being saved or could not be.
        return next(iter(steps(self.directory)), None)

    def resume(self, read: Callable[[int], T]) -> tuple[T | None, list[str]]:
        """What `read` makes of the newest step that is intact (None where there is no step at all), and sentences
        about those that are not: they are renamed to STEP.damaged, so that they neither count nor hide anything.

        Raises AtomError when all are damaged; nothing is renamed then. With several processes, process 0 chooses.
        """
        wrong: dict[int, Damaged] = {}
        for step in steps(self.directory):
            try:
                self._check(step)
                found = read(step)
            except Damaged as e:
                if jax.process_count() > 1 and jax.process_index() > 0:
                    raise
                wrong[step] = e
                continue
            self._set_aside(list(wrong))
            return found, [f"{e}: the checkpoint of step {n} is not used, step {step} is" for n, e in wrong.items()]
        if wrong:
            newest = max(wrong)
            others = f", nor are the {len(wrong) - 1} before it" if len(wrong) > 1 else ""
            raise AtomError(f"{wrong[newest]}: the checkpoint of step {newest} is not intact{others}")
        return None, []

    def _check(self, step: int) -> None:
        """Raises Damaged where the checkpoint of a step is not whole, in every process."""
        problem = ""
        if jax.process_index() == 0:
            try:
                complete(self.directory / str(step), ("params", "opt", *NOTES))
            except Damaged as e:
                problem = str(e)
        if jax.process_count() > 1:
            problem = (
                "" if not multihost_utils.broadcast_one_to_all(np.array(bool(problem))) else problem or "damaged"
            )
        if problem:
            raise Damaged(problem)

    def _set_aside(self, damaged: list[int]) -> None:
        if jax.process_index() == 0:
            for step in damaged:
                number = itertools.count(2)
                target = self.directory / f"{step}.damaged"
                while target.exists():
                    target = self.directory / f"{step}.damaged-{next(number)}"
                with _sentence(f"{self.directory / str(step)} cannot be renamed"):
                    os.rename(self.directory / str(step), target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are out of the way")

    def save(self, step: int, trees: dict[str, Tree], notes: dict[str, Any], suspect: bool = False) -> None:
        """Starts to save trees of arrays and JSON-able NOTES; the arrays may be given up when this returns.

        suspect: this state is not known to be good, so the newest step that is stays, beyond the number to keep.
        Raises AtomError when this save or the one before fails; earlier checkpoints stay as they are.
        """
        args = {k: ocp.args.StandardSave(v) for k, v in trees.items()}
        args |= {k: ocp.args.JsonSave(v) for k, v in notes.items()}
        with self._saving(f"the checkpoint of step {step} could not be saved"):
            if self._manager is None:
                self._manager = self._opened()
            # The step before is on the disk first, so that `_finish` knows which one it is about.
            self._manager.wait_until_finished()
            self._saving_step = step
            about = {"suspect": True} if suspect else None
            self._manager.save(step, args=ocp.args.Composite(**args), force=True, custom_metadata=about)
        self._unchecked = True

    def _opened(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            create=True, enable_async_checkpointing=True, preservation_policy=Newest(self._keep, self.directory),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._finish),
        )  # fmt: skip
        handlers = {name: ocp.StandardCheckpointHandler() for name in (*TREES, *self._extra)}
        handlers |= {name: ocp.JsonCheckpointHandler() for name in NOTES}
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def _finish(self) -> None:
        """Writes the checksums of a step that is complete but not yet renamed to its number."""
        if jax.process_index() == 0:
            for path in self.directory.glob(f"{self._saving_step}.orbax-checkpoint-tmp*"):
                checksums.write(path)

    def check(self) -> None:
        """Raises AtomError when a save has failed meanwhile; cheap enough for every step."""
        if self._unchecked and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when everything is on the disk. Raises AtomError when saving failed."""
        self._unchecked = False
        if self._manager is not None:
            with self._saving("the checkpoint could not be saved"):
                self._manager.wait_until_finished()

    def notes(self, step: int, *names: str) -> list[Any]:
        """The JSON notes of a step. Raises Damaged where they cannot be read."""
        return [_note(self.directory / str(step) / name) for name in names]

    def restore(self, step: int, trees: dict[str, Tree]) -> dict[str, Tree]:
        """Trees of arrays, placed as the ShapeDtypeStructs in `trees` say.

        Raises AtomError for a tensor that is missing or has another shape or dtype, Damaged for unreadable files.
        """
        where = self.directory / str(step)
        for name, tree in trees.items():
            compare(tree, _metadata(where / name), f"{where}/{name}")
        with _sentence(f"{where} cannot be read", error=Damaged), ocp.StandardCheckpointer() as reader:
            return {name: reader.restore(where / name, tree) for name, tree in trees.items()}

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Waits for the last save and raises AtomError when it failed, unless another error is under way."""
        if self._manager is not None:
            quiet = contextlib.suppress(AtomError) if kind else contextlib.nullcontext()
            with quiet, self._saving("saving failed"):
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
    with _sentence(f"{path} could not be saved"), staged(path) as staging:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(staging / "params", lm.params)
        if lm.tokenizer is not None:
            lm.tokenizer.save(staging)
        note = {"model": config.to_json(lm.config), "tokenizer": lm.tokenizer.name if lm.tokenizer else ""}
        (staging / MODEL_FILE).write_text(json.dumps(note, indent=1))
        checksums.write(staging)


def is_checkpoint(path: str | pathlib.Path) -> bool:
    """True for what `load_params` reads."""
    path = pathlib.Path(path)
    return any((path / name).exists() for name in (MODEL_FILE, "checkpoints", "config/metadata"))


def has_begun(workdir: str | pathlib.Path) -> bool:
    """True for the WORKDIR of a run with a complete checkpoint."""
    return bool(steps(pathlib.Path(workdir) / "checkpoints"))


def load_config(path: str | pathlib.Path) -> tuple[Any, Any]:
    """(model configuration, tokenizer) of a model directory, a run's WORKDIR or one of its checkpoints."""
    return _of_newest(path, lambda step: _about(step)[:2])


def load_params(path: str | pathlib.Path, dtype: Any = None, shardings: Any = None) -> tuple[Any, Tree, Any]:
    """(model configuration, parameters, tokenizer) of a model directory, a run's WORKDIR (its newest intact step) or
    WORKDIR/checkpoints/STEP. Of a run that kept an average of its parameters this is the average.

    dtype: converts while reading (None: as saved); shardings: a tree of them, which may hold
    more (None: on the first device). Checksums are verified beside the reading.
    Raises AtomError for anything missing or damaged, or a tensor of another shape than the configuration says.
    """
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def read(step: pathlib.Path) -> tuple[Any, Tree, Any]:
        with checksums.verified(step, ("params", "ema")):
            model, tokenizer = _about(step)
            return model, _parameters(step, model, dtype, shardings), tokenizer

    return _of_newest(path, read)


def load_extra(path: str | pathlib.Path, name: str, describe: Callable[[Any, str], tuple[T, Tree]]) -> tuple[T, Tree]:
    """What an objective trained beside the model of a run, under this name, on the first device; the average of it,
    where the run kept one.

    describe: (the objective as JSON, where it is from) -> (what is returned with the parameters, their ParamSpecs).
    Raises AtomError as `load_params` does.
    """
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def read(step: pathlib.Path) -> tuple[T, Tree]:
        found, spec = describe(_note(step / "config").get("objective"), str(step))
        if not (step / name).is_dir():
            raise AtomError(f"{step} has no {name}")
        with checksums.verified(step, (name, "ema")):
            compare(params_lib.abstract(spec), _metadata(step / name), f"{step}/{name}")
            wanted = params_lib.abstract(spec, shardings=params_lib.map_specs(lambda _: place, spec))
            leaves = _restore(step / name, params_lib.flatten(wanted))
            within = params_lib.flatten({name: wanted})
            averaged = _restore(step / "ema", {k: within[k] for k in within if k in _averaged(step)})
            leaves |= {k.removeprefix(f"{name}/"): x for k, x in averaged.items()}
            return found, params_lib.unflatten({k: leaves[k] for k in params_lib.flatten(wanted)})

    return _of_newest(path, read)


def settings(path: str | pathlib.Path) -> dict[str, Any]:
    """The experiment of a run as JSON, as its newest intact checkpoint has it; {} for a model directory."""
    return _of_newest(path, lambda step: {} if (step / MODEL_FILE).exists() else _note(step / "config"))


def verify(path: str | pathlib.Path) -> tuple[pathlib.Path, int]:
    """The directory that `load_params` would read, and the bytes of it that were compared with their checksums (0:
    it has none). Raises AtomError, which names the file, for damage of the newest step too."""
    step = _candidates(path)[0]
    return step, checksums.verify(step)


def _parameters(step: pathlib.Path, model: Any, dtype: Any, shardings: Any) -> Tree:
    spec = registry.kind(model).spec(model)
    if isinstance(shardings, dict):
        places = sharding.filled(params_lib.flatten(spec), params_lib.flatten(shardings))
    else:
        places = params_lib.map_specs(lambda _: shardings, spec)
    found = _metadata(step / "params")
    compare(params_lib.abstract(spec), found, f"{step}/params", check_dtype=False)
    kinds = params_lib.flatten(found)
    wanted = {
        k: jax.ShapeDtypeStruct(s.shape, dtype or kinds[k].dtype, sharding=s.sharding)
        for k, s in params_lib.flatten(params_lib.abstract(spec, shardings=places)).items()
    }
    averaged = _averaged(step)
    leaves: dict[str, Any] = {}
    for name, chosen in (("ema", averaged), ("params", set(wanted) - averaged)):
        leaves |= _restore(step / name, {k: wanted[k] for k in wanted if k in chosen})
    return params_lib.unflatten({k: leaves[k] for k in wanted})


def _averaged(step: pathlib.Path) -> set[str]:
    """Paths of the parameters of which a run keeps an average."""
    return set(params_lib.flatten(_metadata(step / "ema"))) if (step / "ema").exists() else set()


def _of_newest(path: str | pathlib.Path, read: Callable[[pathlib.Path], T]) -> T:
    """What `read` makes of the newest intact checkpoint under `path`; said aloud where it isn't the newest."""
    wrong: list[Damaged] = []
    for step in _candidates(path):
        try:
            found = read(step)
        except Damaged as e:
            wrong.append(e)
            continue
        for e in wrong:
            logging.warning("%s: %s is used instead", e, step)
        return found
    raise wrong[0]


def _candidates(path: str | pathlib.Path) -> list[pathlib.Path]:
    """The directories that hold `params`, the newest step of a run first."""
    path = pathlib.Path(path).absolute()
    if not (path / MODEL_FILE).exists() and (path / "checkpoints").is_dir():
        found = [path / "checkpoints" / str(step) for step in steps(path / "checkpoints")]
        if not found:
            raise AtomError(f"{path / 'checkpoints'} holds no complete checkpoint")
        return found
    if not (path / MODEL_FILE).exists() and not (path / "config").is_dir():
        raise AtomError(f"{path} is neither a training workdir nor one of its checkpoints")
    return [path]


def _about(step: pathlib.Path) -> tuple[Any, Any]:
    """(model configuration, tokenizer, None for worlds) of one of `_candidates`."""
    if (step / MODEL_FILE).exists():
        note, home = read_json(step / MODEL_FILE), step
    else:
        for name in ("params", "config"):
            if not (step / name).is_dir():
                raise Damaged(f"{step} has no {name}")
        note, home = _note(step / "config"), step.parent.parent
    try:
        model, name = config.from_json(object, note["model"], f"{step}: model"), note["tokenizer"]
    except (KeyError, TypeError):
        raise AtomError(f"{step}: no model and tokenizer are named there") from None
    if registry.kind(model).reads == FRAMES:
        return model, None
    if not isinstance(name, str):
        raise AtomError(f"{step}: tokenizer: expected a name, got {str(name)[:100]!r}")
    # A run keeps a copy of its tokenizer, whatever became of the original.
    if name != "bytes" and (home / "tokenizer.json").exists():
        name = f"bolmo:{home}" if name.startswith("bolmo") else str(home)
    return model, tokenizers.padded(tokenizers.from_name(name or "bytes"), model.vocab_size)


def _note(path: pathlib.Path) -> Any:
    with (
        _sentence(f"{path} cannot be read", error=Damaged),
        ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader,
    ):
        return reader.restore(path, args=ocp.args.JsonRestore())


def _metadata(path: pathlib.Path) -> Tree:
    with _sentence(f"{path} cannot be read", error=Damaged):
        return ocp.StandardCheckpointHandler().metadata(epath.Path(path)).tree


def _restore(path: pathlib.Path, wanted: dict[str, Any]) -> dict[str, Any]:
    if not wanted:
        return {}
    target = params_lib.unflatten(wanted)
    args = ocp.args.PyTreeRestore(
        target, partial_restore=True, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
    )
    with (
        _sentence(f"{path} cannot be read", error=Damaged),
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader,
    ):
        return params_lib.flatten(reader.restore(path, args=args))


@contextlib.contextmanager
def _sentence(what: str, then: str = "", error: type[AtomError] = AtomError) -> Iterator[None]:
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
        raise error(f"{what} ({reason}){then}") from e
