"""Hypernetworks on disk: those of training runs, our own directories, and zett's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from atom_jax import config
from atom_jax import params as params_lib
from atom_jax.checkpoint.atomic import staged
from atom_jax.checkpoint.safetensors_io import SafetensorsSource, write_file
from atom_jax.fields import read_json
from atom_jax.files import read_regular
from atom_jax.params import Tree
from atom_jax.transfer.hypernet import Hypernet, Projector, Zett
from atom_jax.typing import AtomError

_CONFIG, _TENSORS, _ZETT = "hypernet.json", "model.safetensors", "flax_model.msgpack"
# Published names -> ours, both as regular expressions see them; kernel and bias, scale and bias at the end.
_PROJECTOR = (
    (r"transformer\.position_embeddings\.embedding", "positions"),
    (r"transformer\.layers_(\d+)\.mlp\.intermediate", r"layers/\1/up"),
    (r"transformer\.layers_(\d+)\.mlp\.output", r"layers/\1/down"),
    (r"transformer\.layers_(\d+)\.post_mlp_layernorm", r"layers/\1/norm"),
    (r"output_linear", "out"),
    (r"(in|out)_rescaler", r"\1_scale"),
)
_ENCODER = r"model\.encoder\.layer\.(\d+)\."
_ZETT_NAMES = (
    (r"fallback_embeddings\.embedding", "own"),
    (r"input_projection\.layers_0", "project/in"),
    (r"input_projection\.layers_1\.(\w+)", r"project/block/\1"),
    (r"output_projection\.layers_0\.(\w+)", r"heads/plane_0/block/\1"),
    (r"output_projection\.layers_1", "heads/plane_0/out"),
    (r"output_projection_out\.layers_0\.(\w+)", r"heads/plane_1/block/\1"),
    (r"output_projection_out\.layers_1", "heads/plane_1/out"),
    (r"bias_projection", "bias"),
    (r"model\.embeddings\.position_embeddings\.embedding", "positions"),
    (r"model\.embeddings\.token_type_embeddings\.embedding", "kind"),
    (r"model\.embeddings\.LayerNorm", "embed_norm"),
    (_ENCODER + r"attention\.self\.([qkv])\w+", r"layers/\1/\2"),
    (_ENCODER + r"attention\.output\.dense", r"layers/\1/o"),
    (_ENCODER + r"attention\.output\.LayerNorm", r"layers/\1/attn_norm"),
    (_ENCODER + r"intermediate\.dense", r"layers/\1/up"),
    (_ENCODER + r"output\.dense", r"layers/\1/down"),
    (_ENCODER + r"output\.LayerNorm", r"layers/\1/norm"),
    (r"in_scaler", "in_scale"),
    (r"scaler", "out_scale/0"),
    (r"out_scaler", "out_scale/1"),
)
_ENDS = {"kernel": "w", "scale": "weight", "dense1": "up", "dense2": "down", "ln": "norm"}


def save(directory: str | Path, net: Hypernet, p: Tree) -> None:
    """Writes hypernet.json and model.safetensors."""
    with staged(directory) as staging:
        (staging / _CONFIG).write_text(json.dumps(config.to_json(net), indent=1) + "\n")
        write_file({k: np.asarray(x, np.float32) for k, x in params_lib.flatten(p).items()}, staging / _TENSORS)


def load(path: str | Path) -> tuple[Hypernet, Tree]:
    """The network of a run's WORKDIR (objective "hypernet"), of a directory that `save` wrote, or of a checkpoint of
    zett, with its parameters. Raises AtomError for anything else, and for what is missing or has another shape."""
    path = Path(path)
    if (path / _CONFIG).is_file():
        net = _net(read_json(path / _CONFIG), str(path / _CONFIG))
        source = SafetensorsSource(path / _TENSORS)
        leaves = {name: source.read(name) for name in source.infos}
    elif (path / _ZETT).is_file():
        net, leaves = _zett(path)
    elif (path / "checkpoints").is_dir():
        return _of_run(path)
    else:
        raise AtomError(f"{path}: no hypernetwork is there ({_CONFIG}, {_ZETT} or a run's checkpoints)")
    return net, _checked(net, leaves, str(path))


def published(net: Hypernet, tensors: dict[str, Any], where: str = "hypernet") -> Tree:
    """Parameters from tensors of tokenkit ("params.output_linear.kernel") or zett, by their names. Raises AtomError
    for names that are unknown, and for what is missing or has another shape."""
    names, leaves = _PROJECTOR if isinstance(net, Projector) else _ZETT_NAMES, {}
    for name, x in tensors.items():
        own = _renamed(name.removeprefix("params."), names)
        if own is None:
            if "inter_token_blocks" in name:
                continue  # written by zett also where nothing uses it
            raise AtomError(f"{where}: there is no place for the tensor {name[:80]}")
        try:
            leaves[own] = np.asarray(x, np.float32)
        except (TypeError, ValueError):
            raise AtomError(f"{where}: {name[:80]} is no tensor of numbers") from None
    layers: dict[str, list[np.ndarray]] = {}
    for name in sorted((k for k in leaves if k.startswith("layers/")), key=lambda k: int(k.split("/")[1])):
        _, _, rest = name.split("/", 2)
        layers.setdefault(f"layers/{rest}", []).append(leaves.pop(name))
    for name, parts in layers.items():
        if len({x.shape for x in parts}) > 1:
            raise AtomError(f"{where}: {name} has another shape in some layers than in others")
        leaves[name] = np.stack(parts)
    return _checked(net, _scales(net, leaves), where)


def _renamed(name: str, names: tuple[tuple[str, str], ...]) -> str | None:
    """Our path of a published tensor, None for an unknown one."""
    for pattern, own in names:
        whole = pattern if pattern.endswith("embedding") else pattern + r"\.(?P<end>kernel|bias|scale|w|b)"
        if found := re.fullmatch(whole, name):
            path = [_ENDS.get(part, part) for part in found.expand(own).split("/")]
            end = found.groupdict().get("end")
            if end is None:
                return "/".join(path)
            norm = path[-1].endswith("norm")
            return "/".join([*path, _ENDS.get(end, end) if norm or end != "bias" else "b"])
    return None


def _scales(net: Hypernet, leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With scales of all planes in one array; published ones are separate, or one for all planes."""
    out, shape = dict(leaves), (net.n, net.d)
    for part in "wb":
        parts = [out.pop(f"out_scale/{i}/{part}") for i in range(2) if f"out_scale/{i}/{part}" in out]
        if parts:
            out[f"out_scale/{part}"] = np.concatenate(parts)
        for name in (f"in_scale/{part}", f"out_scale/{part}"):
            if name in out and out[name].size in (net.d, net.n * net.d):
                out[name] = np.broadcast_to(out[name].reshape(-1, net.d), shape)
    return out


def _checked(net: Hypernet, leaves: dict[str, np.ndarray], where: str) -> Tree:
    spec = params_lib.flatten(net.spec())
    for name in sorted(set(spec) | set(leaves)):
        shapes = [list(found[name].shape) if name in found else "absent" for found in (leaves, spec)]
        if shapes[0] != shapes[1]:
            raise AtomError(f"{where}: {name} is {shapes[0]}, expected {shapes[1]}")
    return params_lib.unflatten({name: leaves[name] for name in spec})


def _zett(path: Path) -> tuple[Hypernet, dict[str, Any]]:
    """Network and parameters of a checkpoint of zett."""
    from flax import serialization

    try:
        tree = serialization.msgpack_restore(read_regular(path / _ZETT))
        tensors = {name.replace("/", "."): x for name, x in params_lib.flatten(tree).items()}
    except Exception as e:  # a damaged file, in which anything may be
        raise AtomError(f"{path / _ZETT}: cannot be read ({type(e).__name__})") from None
    net = zett_of(read_json(path / "config.json"), tensors, str(path / "config.json"))
    return net, params_lib.flatten(published(net, tensors, str(path / _ZETT)))


def zett_of(fields: dict[str, Any], tensors: dict[str, Any], where: str) -> Zett:
    """The network that zett's config.json describes, with as many positions as its tensors have. Raises AtomError
    for kinds that aren't built here: embedded languages and priors, attention between tokens, one head for both
    planes."""
    table = next((x for name, x in tensors.items() if name.endswith("position_embeddings.embedding")), None)
    if table is None:
        raise AtomError(f"{where}: the tensors beside it have no table of positions")
    for name in ("hn_embed_lang_id", "hn_embed_target_priors", "hn_add_inter_token_attention", "hn_single_head",
                 "hn_concat_last_hidden_state"):  # fmt: skip
        if fields.get(name):
            raise AtomError(f"{where}: {name} is not supported")
    try:
        heads = fields.get("hn_num_attention_heads") or min(fields["hn_hidden_size"] // 64, 32)
        return Zett(
            n=2 if fields["separate_out_embeddings"] else 1, d=fields["n_embd"], length=fields["hn_surface_maxlen"],
            width=fields["hn_hidden_size"], n_layers=fields["hn_n_layers"], heads=heads,
            d_ff=fields["hn_intermediate_size"], extra=fields["hn_n_extra_tokens"],
            biased=bool(fields.get("hn_predict_bias")), positions=len(table),
        )  # fmt: skip
    except KeyError as e:
        raise AtomError(f"{where}: {e.args[0]} is missing") from None
    except TypeError:
        raise AtomError(f"{where}: sizes must be whole numbers") from None
    except AtomError as e:
        raise AtomError(f"{where}: {e}") from None


def _of_run(path: Path) -> tuple[Hypernet, Tree]:
    from atom_jax.checkpoint import store  # imports Orbax, which takes a second

    return store.load_extra(path, "hypernet", _net_of)


def _net_of(objective: Any, where: str) -> tuple[Hypernet, Tree]:
    """The network that an experiment trained, and its ParamSpecs."""
    net = _net((objective or {}).get("net"), f"{where}: objective.net")
    return net, net.spec()


def _net(fields: Any, where: str) -> Hypernet:
    """The network that fields in JSON describe."""
    net = config.from_json(Hypernet, fields, where)
    if not isinstance(net, Projector | Zett):
        raise AtomError(f"{where}: a {type(net).__name__} is no Projector and no Zett")
    return net
