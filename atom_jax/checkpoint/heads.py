"""Multi-token heads (`models.mtp`) on disk, to be put beside the model that they were trained for.

A directory of heads has:

    mtp.json         {"format": 1, "base": as in adapter.json, "heads": their number, "width": within each}
    mtp.safetensors  their tensors, float32, as `models.mtp.spec` names them
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from atom_jax import checkpoint
from atom_jax import params as params_lib
from atom_jax.checkpoint import adapters
from atom_jax.checkpoint.atomic import staged
from atom_jax.checkpoint.safetensors_io import SafetensorsSource, write_file
from atom_jax.fields import Fields, read_json
from atom_jax.models import mtp
from atom_jax.params import Tree
from atom_jax.typing import AtomError

FORMAT = 1
CONFIG, TENSORS = "mtp.json", "mtp.safetensors"


def save(directory: str | os.PathLike, cfg: Any, p: Tree, name: str = "") -> None:
    """Writes the heads `p` of a model of the configuration `cfg`; name: what that is called, for readers. All or
    nothing. Raises AtomError where the directory cannot be written."""
    heads, _, width = p["state"].shape
    table = {"format": FORMAT, "base": adapters.base_of(cfg, name), "heads": heads, "width": width}
    with staged(directory) as staging:
        write_file({k: np.asarray(x, np.float32) for k, x in params_lib.flatten(p).items()}, staging / TENSORS)
        (staging / CONFIG).write_text(json.dumps(table, indent=2) + "\n", "utf-8")


def load(path: str | os.PathLike, cfg: Any) -> Tree:
    """The heads of a directory that `save` wrote, or of the WORKDIR of a run that trained some (objective "mtp"), in
    the compute dtype of `cfg`, the model beside which they are to stand. Raises AtomError, naming the file and the
    field or tensor, where there are none, and for those of another model."""
    path = Path(path)
    if (path / CONFIG).is_file():
        p = _of_directory(path, cfg)
    elif (path / "checkpoints").is_dir():
        theirs, p = of_run(path)
        try:
            adapters.check_base(cfg, Fields({"base": adapters.base_of(theirs, "")}, str(path)))
        except AtomError as e:
            raise AtomError(f"{path}: {e}") from None
    else:
        raise AtomError(f"{path}: no heads are there ({CONFIG}, or the checkpoints of a run that trained some)")
    # On no device in particular: they follow the model's arrays.
    return params_lib.cast({name: jnp.asarray(np.asarray(x)) for name, x in p.items()}, cfg.dtype)


def of_run(path: str | os.PathLike) -> tuple[Any, Tree]:
    """The configuration of a run's model, and the heads that it trained beside it. Raises AtomError where it trained
    none, or its checkpoints cannot be read."""
    from atom_jax.checkpoint import store  # imports Orbax, which takes a second

    if not trained(path):
        raise AtomError(f"{path}: the run trained no multi-token heads, so there is nothing to draft with")
    cfg = checkpoint.load_config(path)[0]

    def described(objective: Any, where: str) -> tuple[None, Tree]:
        fields = Fields(objective or {}, f"{where}: objective")
        return None, mtp.spec(cfg.d_model, fields.size("heads"), fields.size("width", least=0))

    return cfg, store.load_extra(path, mtp.NAME, described)[1]


def trained(path: str | os.PathLike) -> bool:
    """Whether that is the WORKDIR of a run that trained heads."""
    if not (Path(path) / "checkpoints").is_dir():
        return False
    from atom_jax.checkpoint import store

    return (store.settings(path).get("objective") or {}).get("class") == "MultiToken"


def is_directory(path: str | os.PathLike) -> bool:
    """Whether that is a directory of heads."""
    return (Path(path) / CONFIG).is_file()


def about(path: str | os.PathLike) -> tuple[str, list[tuple[str, str]], SafetensorsSource]:
    """What a directory of heads holds, as `adapters.about` says it of adapters."""
    fields = Fields(read_json(Path(path) / CONFIG), str(Path(path) / CONFIG))
    said = f"{fields.size('heads')}, of width {fields.size('width')}"
    base = ", ".join(f"{k} {str(v)[:40]}" for k, v in fields.table("base").data.items() if v)
    return "multi-token heads", [("for", base), ("heads", said)], SafetensorsSource(Path(path) / TENSORS)


def _of_directory(path: Path, cfg: Any) -> Tree:
    where = path / CONFIG
    fields = Fields(read_json(where), str(where))
    if fields.data.get("format") != FORMAT:
        raise AtomError(f"{where}: format is {str(fields.data.get('format'))[:60]}; only {FORMAT} is known")
    try:
        adapters.check_base(cfg, fields)
    except AtomError as e:
        raise AtomError(e if str(e).startswith(str(where)) else f"{where}: {e}") from None
    spec = params_lib.flatten(mtp.spec(cfg.d_model, fields.size("heads"), fields.size("width")))
    source = SafetensorsSource(path / TENSORS)
    for name in sorted(set(spec) | set(source.infos)):
        shapes = [list(found[name].shape) if name in found else "absent" for found in (source.infos, spec)]
        if shapes[0] != shapes[1]:
            raise AtomError(f"{path / TENSORS}: {name} is {shapes[0]}, expected {shapes[1]}")
    return params_lib.unflatten({name: source.read(name) for name in spec})
