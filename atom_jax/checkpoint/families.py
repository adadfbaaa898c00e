"""One table of rules per family from published tensor names to our parameters, used to load and to export."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from atom_jax import params as params_lib
from atom_jax.checkpoint.tensors import TensorInfo, TensorSource
from atom_jax.kvcache.dms import low_rank
from atom_jax.models import registry
from atom_jax.models.bolmo import BolmoConfig
from atom_jax.models.transformer import TransformerConfig
from atom_jax.typing import AtomError


@dataclasses.dataclass(frozen=True)
class Rule:
    """Published name -> our path; {i} in the name is `first` + the number of the layer in our stack.

    inputs = 0 keeps the array as it is, with a second axis of length one when unit_axis. Otherwise the published
    matrix is [out, in], and ours its transpose with the first `inputs` axes together being "in" and the rest "out".
    """

    hf: str
    path: str
    inputs: int = 0
    unit_axis: bool = False
    first: int = 0

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the published tensor for our shape (without the layer axis)."""
        if self.unit_axis:
            return (shape[0], 1, *shape[1:])
        return (math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])) if self.inputs else shape

    def to_hf(self, x: np.ndarray) -> np.ndarray:
        """Our array of one layer in its published form."""
        return x.reshape(self.hf_shape(x.shape)[::-1]).T if self.inputs else x.reshape(self.hf_shape(x.shape))

    def from_hf(self, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The published array in our form (a view)."""
        return (x.T if self.inputs else x).reshape(shape)


def _layer(hf: str, path: str, inputs: int = 0) -> Rule:
    return Rule(f"model.layers.{{i}}.{hf}.weight", f"layers/{path}", inputs)


_COMMON = (
    Rule("model.embed_tokens.weight", "embed"),
    _layer("self_attn.q_proj", "attn/q", 1),
    _layer("self_attn.k_proj", "attn/k", 1),
    _layer("self_attn.v_proj", "attn/v", 1),
    _layer("self_attn.o_proj", "attn/o", 2),
    _layer("mlp.gate_proj", "mlp/gate", 1),
    _layer("mlp.up_proj", "mlp/up", 1),
    _layer("mlp.down_proj", "mlp/down", 1),
    Rule("model.norm.weight", "norm"),
    Rule("lm_head.weight", "unembed", 1),
    # Learned evictors (kvcache/dms): the first two are published, the others our own.
    _layer("self_attn.dms_proj_alpha", "attn/dms/alpha", 1),
    _layer("self_attn.dms_proj_alpha_norm", "attn/dms/norm"),
    _layer("self_attn.dms_observed", "attn/dms/observed", 1),
    Rule("model.layers.{i}.self_attn.dms_proj_alpha.bias", "layers/attn/dms/bias"),
    # Their corrections to the projections, under the names of PEFT.
    *(_layer(f"self_attn.{n}_proj.lora_A", f"attn/dms/{n}_a", inputs) for n, inputs in low_rank.INPUTS.items()),
    *(_layer(f"self_attn.{n}_proj.lora_B", f"attn/dms/{n}_b", 1) for n in low_rank.INPUTS),
)
_QK_NORM = (_layer("self_attn.q_norm", "attn/q_norm"), _layer("self_attn.k_norm", "attn/k_norm"))
# The same published name stands for different norms: before the MLP, or after attention.
_PRE_NORM = (_layer("input_layernorm", "attn_norm"), _layer("post_attention_layernorm", "mlp_norm"))
_POST_NORM = (_layer("post_attention_layernorm", "attn_norm"), _layer("post_feedforward_layernorm", "mlp_norm"))

RULES: dict[str, tuple[Rule, ...]] = {
    "llama": _COMMON + _PRE_NORM,
    "qwen3": _COMMON + _PRE_NORM + _QK_NORM,
    "olmo2": _COMMON + _POST_NORM + _QK_NORM,
    "olmo3": _COMMON + _POST_NORM + _QK_NORM,
}
# Written by old versions of transformers; recomputed from the configuration.
_DERIVED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


@dataclasses.dataclass(frozen=True)
class _Place:
    rule: Rule
    shape: tuple[int, ...]  # of one layer, in our form
    layer: int | None


def _places(cfg: Any, part: str = "") -> dict[str, _Place]:
    """Every published name of this model, layer by layer, with where it goes; only for paths that contain `part`."""
    specs = _specs(cfg, part)
    places = {}
    for rule in _rules(cfg):
        if rule.path not in specs:
            continue
        shape = specs[rule.path].shape
        if "{i}" not in rule.hf:
            places[rule.hf] = _Place(rule, shape, None)
        else:
            places |= {rule.hf.format(i=rule.first + i): _Place(rule, shape[1:], i) for i in range(shape[0])}
    return places


def _specs(cfg: Any, part: str) -> dict[str, params_lib.ParamSpec]:
    return {path: spec for path, spec in params_lib.flatten(registry.of(cfg).spec(cfg)).items() if part in path}


def _rules(cfg: Any) -> Sequence[Rule]:
    if isinstance(cfg, TransformerConfig):
        return RULES[cfg.family]
    from atom_jax.checkpoint import bolmo_hf, hnet_hf

    return bolmo_hf.rules(cfg) if isinstance(cfg, BolmoConfig) else hnet_hf.rules(cfg)


def load(
    source: TensorSource,
    cfg: TransformerConfig,
    dtype: Any = None,
    shardings: Any = None,
    part: str = "",
    asked_by: str = "config.json",
) -> params_lib.Tree:
    """Parameters of `cfg` from published tensors: the tree of `spec(cfg)`, layers stacked.

    dtype: cast to it, or None to keep what is stored. shardings: tree of jax.sharding.Sharding, or None; may hold
    more. part: read the parameters whose path contains it, and expect no other tensors. asked_by: the file that says
    which tensors there are, for messages.
    One stacked array is assembled at a time on the host, which on the CPU becomes the parameter itself. Raises
    AtomError, naming the first few, for missing, unexpected or misshapen tensors and for weights of other types.
    """
    places, specs = _places(cfg, part), _specs(cfg, part)
    source = _as_published(source, places, cfg)
    _check(source, places, cfg, asked_by)
    placements = None if shardings is None else params_lib.flatten(shardings)
    names: dict[str, list[str]] = {}
    for name, place in places.items():
        names.setdefault(place.rule.path, []).append(name)
    leaves = {}
    for path, spec in specs.items():
        stored = {source.infos[name].dtype for name in names[path]}
        out = _aligned(spec.shape, dtype or (stored.pop() if len(stored) == 1 else np.float32))
        for name in names[path]:
            place = places[name]
            target = out if place.layer is None else out[place.layer]
            target[...] = place.rule.from_hf(source.read(name), place.shape)
        leaves[path] = _to_device(out, None if placements is None else placements[path])
    return params_lib.unflatten(leaves)


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


class _Renamed:
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
    return _Renamed(source, names)


def _check(source: TensorSource, places: dict[str, _Place], cfg: TransformerConfig, asked_by: str) -> None:
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

    part: only those whose path contains it. Dtypes are kept. Raises AtomError where the parameters do not have the
    shapes of `cfg`.
    """

    def __init__(self, cfg: TransformerConfig, params: params_lib.Tree, part: str = ""):
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
