"""The table of cache policies by name, and how they are written on a command line: "snapkv:budget=512,window=32", or
"quest:budget=512;0=none;1=none" with others for some layers. Adding one is one file and one line here."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from atom_jax import config
from atom_jax.fields import Fields
from atom_jax.files import read_regular
from atom_jax.kvcache.adakv import AdaKV
from atom_jax.kvcache.cam import CaM
from atom_jax.kvcache.d2o import D2O
from atom_jax.kvcache.dense import DenseLayer
from atom_jax.kvcache.dmc import DMC
from atom_jax.kvcache.dms import DMS, Revised
from atom_jax.kvcache.expected_attention import ExpectedAttention
from atom_jax.kvcache.h2o import H2O
from atom_jax.kvcache.keydiff import KeyDiff
from atom_jax.kvcache.knorm import KNorm
from atom_jax.kvcache.kvcompose import KVCompose
from atom_jax.kvcache.kvmerger import KVMerger
from atom_jax.kvcache.layer import Sizes, stack_layers
from atom_jax.kvcache.memory import Stack
from atom_jax.kvcache.observed_attention import ObservedAttention
from atom_jax.kvcache.policy import PerLayer, Policy, policies_of
from atom_jax.kvcache.pyramidkv import PyramidKV
from atom_jax.kvcache.quest import Quest
from atom_jax.kvcache.random_policy import RandomPolicy
from atom_jax.kvcache.razor_attention import RazorAttention
from atom_jax.kvcache.sepllm import SepLLM
from atom_jax.kvcache.shared import Shared
from atom_jax.kvcache.snapkv import SnapKV
from atom_jax.kvcache.streaming_llm import StreamingLLM
from atom_jax.kvcache.subgen import SubGen
from atom_jax.kvcache.tova import TOVA
from atom_jax.kvcache.window import WindowLayer
from atom_jax.kvcache.wmerge import WMerge
from atom_jax.naming import Rule
from atom_jax.typing import AtomError

POLICIES: dict[str, type[Policy]] = {
    p.name: p
    for p in (
        DMS,
        Revised,
        DMC,
        StreamingLLM,
        TOVA,
        H2O,
        ObservedAttention,
        SnapKV,
        PyramidKV,
        AdaKV,
        KNorm,
        ExpectedAttention,
        KeyDiff,
        SepLLM,
        RazorAttention,
        KVCompose,
        Shared,
        RandomPolicy,
        Quest,
        WMerge,
        CaM,
        D2O,
        KVMerger,
        SubGen,
    )
}


def register(cls: type[Policy]) -> type[Policy]:
    """Makes a policy of one's own, a frozen dataclass, known by its name and to configurations that are read."""
    POLICIES[cls.name] = cls
    return config.register(cls)


def parse(text: str) -> Policy | PerLayer | None:
    """The policy that a text such as "tova:budget=512" names; None for "none". After it, ";LAYER=POLICY" names other
    ones for single layers. A text that ends in .json is a file with a policy as `config.to_json` writes it.

    Raises AtomError for an unknown name, an unknown field or an unreadable value or file.
    """
    if text.endswith(".json"):
        return _read(pathlib.Path(text))
    first, *others = text.split(";")
    if not others:
        return _parse(first)
    at = []
    for other in others:
        layer, _, one = other.partition("=")
        if not layer.strip().isdecimal():
            raise AtomError(f"memory {other!r}: expected LAYER=POLICY")
        at.append((int(layer), _parse(one)))
    return PerLayer(_parse(first), tuple(at))


def _read(path: pathlib.Path) -> Policy | PerLayer:
    try:
        memory = config.from_json(object, json.loads(read_regular(path)), str(path))
    except OSError as e:
        raise AtomError(f"memory {path}: cannot be read ({e.strerror})") from None
    except (ValueError, RecursionError):
        raise AtomError(f"memory {path}: not valid JSON") from None
    check(memory)
    return memory


def _parse(text: str) -> Policy | None:
    if text.strip().partition(":")[0] == "none":
        return None
    return config.named(text, POLICIES, "memory", also="none")


def check(memory: Any) -> None:
    """Raises AtomError for what is neither None nor a known policy, or a choice among these."""
    for policy in policies_of(memory):
        if type(policy) not in POLICIES.values():
            raise AtomError(f"memory: expected none or one of {', '.join(POLICIES)}, got {policy!r}")


def empty(policy: Policy | None, sizes: Sizes, capacity: int, numbers: tuple[int, ...], window: int | None) -> Stack:
    """The empty memory of a run of equal layers, with room for `capacity` tokens per row; see `Policy.init`.

    window: of sliding layers, which keep a ring where there is no policy, else None.
    """
    if policy is not None:
        return Stack(policy.init(sizes, capacity, numbers))
    shape = (sizes.b, sizes.h, capacity, sizes.k, sizes.dtype)
    layer = DenseLayer.empty(*shape) if window is None else WindowLayer.empty(*shape, window)
    return Stack(stack_layers(layer, len(numbers)))


def known_fields() -> frozenset[str]:
    """Fields of config.json that policies know."""
    return frozenset().union(*(policy.fields for policy in POLICIES.values()))


def from_hf(fields: Fields) -> Policy | None:
    """The policy that a config.json describes; None where it names none."""
    return next((p for policy in POLICIES.values() if (p := policy.from_hf(fields)) is not None), None)


def to_hf(memory: Any, family: str) -> dict[str, Any]:
    """Fields of the config.json of a model of this family with this `memory`. AtomError where they can't say it."""
    found = [fields for policy in policies_of(memory) if (fields := policy.to_hf(family))]
    if found and isinstance(memory, PerLayer):
        raise AtomError("memory: config.json has no fields for learned policies that differ between layers")
    return found[0] if found else {}


def rules(memory: Any) -> list[Rule]:
    """Published names, within a layer's attention, of what the policies of a `memory` learn."""
    return [rule.inside("", f"{policy.learned_as}/") for policy in policies_of(memory) for rule in policy.rules()]
