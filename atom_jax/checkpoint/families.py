"""Published tensors <-> our parameters, by the rules of a family (`models.published`) in both directions."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_dtypes
import numpy as np

from atom_jax import params as params_lib
from atom_jax.checkpoint.tensors import TensorInfo, TensorSource
from atom_jax.models import registry
from atom_jax.naming import Rule
from atom_jax.typing import AtomError

# Written by old versions of transformers; recomputed from the configuration.
_DERIVED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


@dataclasses.dataclass(frozen=True)
class _Place:
    rule: Rule
    shape: tuple[int, ...]  # of one layer, in our form
    layer: int | None


def _places(cfg: Any, part: Collection[str] | None = None) -> dict[str, _Place]:
    """Every published name of this model, layer by layer, with where it goes; only for the paths of `part`."""
    published = registry.of(cfg).published
    if published is None:
        raise AtomError(f"models of family {cfg.family} have no Hugging Face format here")
    specs, places = _specs(cfg, part), {}
    rules = {rule.path: rule for rule in published.rules(cfg)}
    if missing := [path for path in specs if path not in rules]:
        raise AtomError(f"{cfg.family}: there is no published name for {missing[0]}")
    for path, rule in rules.items():
        if path not in specs:
            continue
        shape = specs[path].shape
        if "{i}" not in rule.hf:
            places[rule.hf] = _Place(rule, shape, None)
        else:
            places |= {rule.hf.format(i=rule.first + i): _Place(rule, shape[1:], i) for i in range(shape[0])}
    return places


def _specs(cfg: Any, part: Collection[str] | None) -> dict[str, params_lib.ParamSpec]:
    flat = params_lib.flatten(registry.of(cfg).spec(cfg))
    return flat if part is None else {path: spec for path, spec in flat.items() if path in part}


def load(
    source: TensorSource,
    cfg: Any,
    dtype: Any = None,
    shardings: Any = None,
    part: Collection[str] | None = None,
    asked_by: str = "config.json",
) -> params_lib.Tree:
    """Parameters of `cfg` from published tensors: the tree of `spec(cfg)`, layers stacked.

    dtype: cast to it, or None to keep what is stored. shardings: tree of jax.sharding.Sharding, or None; may hold
    more. part: paths of the parameters to read, where no other tensors are expected; None: all. asked_by: the file
    that says which tensors there are, for messages.
    One stacked array is assembled at a time on the host, which on the CPU becomes the parameter itself; beside that
    the next tensor is read and its checksum verified. Raises AtomError, naming the first few, for missing, unexpected
    or misshapen tensors and for weights of other types.
    """
    places, specs = _places(cfg, part), _specs(cfg, part)
    source = _as_published(source, places, cfg)
    _check(source, places, cfg, asked_by)
    placements = None if shardings is None else params_lib.flatten(shardings)
    names: dict[str, list[str]] = {}
    for name, place in places.items():
        names.setdefault(place.rule.path, []).append(name)
    tensors = _ahead(source, [name for path in specs for name in names[path]])
    leaves = {}
    for path, spec in specs.items():
        stored = {source.infos[name].dtype for name in names[path]}
        out = _aligned(spec.shape, dtype or (stored.pop() if len(stored) == 1 else np.float32))
        for name in names[path]:
            place = places[name]
            target = out if place.layer is None else out[place.layer]
            target[...] = place.rule.from_hf(next(tensors), place.shape)
        leaves[path] = _to_device(out, None if placements is None else placements[path])
    return params_lib.unflatten(leaves)


def _ahead(source: TensorSource, names: Sequence[str]) -> Iterator[np.ndarray]:
    """The tensors of these names, each read while the one before is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = collections.deque()
        for name in names:
            coming.append(thread.submit(source.read, name))
            if len(coming) == 2:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array that JAX takes over on the CPU without a copy: it must begin at a multiple of 64 bytes."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _to_device(x: np.ndarray, sharding: Any) -> jax.Array:
    if sharding is None:
        return jax.device_put(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


class Renamed:
    """A source by other names. names: the one to ask for -> the one that is stored."""

    def __init__(self, source: TensorSource, names: dict[str, str]):
        self.label, self._source, self._names = source.label, source, names
        self.infos = {name: source.infos[stored] for name, stored in names.items()}

    def read(self, name: str) -> np.ndarray:
        """See TensorSource."""
        return self._source.read(self._names[name])


def _as_published(source: TensorSource, places: dict[str, _Place], cfg: Any) -> TensorSource:
    """The source by the names of `places`: base models are saved without "model." in front of them, and of a head
    that is tied to the embedding some files hold nothing but the head."""
    names = {}
    for stored in source.infos:
        whole = f"model.{stored}"
        base = whole in places and stored not in places and whole not in source.infos
        names[whole if base else stored] = stored
    embedding = next((name for name, place in places.items() if place.rule.path == "embed"), None)
    if cfg.tie_embeddings and embedding and embedding not in names and "lm_head.weight" in names:
        names[embedding] = names.pop("lm_head.weight")
    return Renamed(source, names)


def _check(source: TensorSource, places: dict[str, _Place], cfg: Any, asked_by: str) -> None:
    missing = [name for name in places if name not in source.infos]
    if missing:
        hint = "; a base model has no head of its own" if missing == ["lm_head.weight"] else ""
        raise AtomError(f"{source.label}: {_listing(missing, 'missing')} for a {cfg.family} of this {asked_by}{hint}")
    extra = [name for name in source.infos if name not in places and not _DERIVED.fullmatch(name)]
    embedding = next((name for name, place in places.items() if place.rule.path == "embed"), None)
    if cfg.tie_embeddings and embedding and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")
        if not _same(source, "lm_head.weight", embedding):
            raise AtomError(f"{source.label}: lm_head.weight differs from the embedding, yet config.json ties them")
    if extra:
        raise AtomError(f"{source.label}: {_listing(extra, 'unexpected')} for a {cfg.family} of this {asked_by}")
    for name, place in places.items():
        info, expected = source.infos[name], place.rule.hf_shape(place.shape)
        if info.shape != expected:
            raise AtomError(f"{source.label}: tensor '{name}' is {info.shape}; {asked_by} asks for {expected}")
        if info.dtype not in _FLOATS:
            raise AtomError(f"{source.label}: tensor '{name}' is {info.dtype}, not float32, float16 or bfloat16")


def _same(source: TensorSource, a: str, b: str) -> bool:
    return source.infos[a] == source.infos[b] and source.read(a).tobytes() == source.read(b).tobytes()


def _listing(names: list[str], what: str) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {what} tensor{'s' if len(names) > 1 else ''} ({', '.join(names[:3])}{more})"


class ExportSource:
    """The parameters of a model under their published names, one tensor at a time; the inverse of `load`.

    part: paths of those that count; None: all. Dtypes are kept. Raises AtomError where the parameters do not have the
    shapes of `cfg`.
    """

    def __init__(self, cfg: Any, params: params_lib.Tree, part: Collection[str] | None = None):
        self.label = f"{cfg.family} parameters"
        specs, self._leaves = params_lib.flatten(registry.of(cfg).spec(cfg)), params_lib.flatten(params)
        if {path: spec.shape for path, spec in specs.items()} != {p: x.shape for p, x in self._leaves.items()}:
            wrong = [p for p in {**specs, **self._leaves} if _shape(specs, p) != _shape(self._leaves, p)]
            raise AtomError(f"{self.label}: {_listing(wrong, 'missing, unexpected or misshapen')} for this config")
        self._places = _places(cfg, part)
        self.infos = {}
        for name, place in self._places.items():
            leaf = self._leaves[place.rule.path]
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                raise AtomError(f"{self.label}: '{place.rule.path}' is spread over several hosts; gather it first")
            self.infos[name] = TensorInfo(place.rule.hf_shape(place.shape), np.dtype(leaf.dtype))

    def read(self, name: str) -> np.ndarray:
        """One tensor in its published shape."""
        place = self._places[name]
        leaf = self._leaves[place.rule.path]
        # Sliced before the copy to the host: an array that was copied whole keeps that copy for as long as it lives.
        return place.rule.to_hf(np.asarray(leaf if place.layer is None else leaf[place.layer]))


def _shape(leaves: dict[str, Any], path: str) -> tuple[int, ...] | None:
    return leaves[path].shape if path in leaves else None
