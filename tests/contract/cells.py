"""What the contract is about: the small examples of every family and all that goes with them, by the registries, and
the sentences with which some refuse. `python -m tests.contract.cells` rewrites docs/families.md from them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from atom_jax import params, tokenizers
from atom_jax.checkpoint import families
from atom_jax.chunking import pooling, rules, upsampling
from atom_jax.chunking.rules.fixed import Fixed
from atom_jax.chunking.types import START
from atom_jax.kvcache import policies
from atom_jax.kvcache.policy import PerLayer, Policy
from atom_jax.lasting import inside
from atom_jax.models import registry
from atom_jax.models.hnet.examples import small as small_hnet
from atom_jax.typing import LM, AtomError
from tests.kvcache.tiny import small

# Some policy: where a layer can have it, it can have all others.
ANY = policies.POLICIES["tova"]
TEXT = "It is so. He, a кот, is at 12 on a hill; Дом г! Is it to be or not? I am in. "
DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "families.md"


def by_name() -> dict[str, Any]:
    """The examples of all families of texts, and one of each way to find, pool or spread units that none of them
    takes."""
    found = {f"{f.name}-{name}": cfg for f in registry.FAMILIES.values() for name, cfg in f.examples().items()}
    taken = [c for cfg in found.values() for c in getattr(cfg, "chunking", ())]
    for rule, parts in rules.RULES.items():
        if rule not in [type(c.rule) for c in taken] and not rules.for_frames(rule()):
            pool = "first" if parts.KIND == START else "mean"
            found[f"hnet-{rule.__name__.lower()}"] = small_hnet({"rule": rule(), "pool": pool})
    for pool in pooling.POOLS:
        if pool not in [c.pool for c in taken]:
            found[f"hnet-pool-{pool}"] = small_hnet({"rule": Fixed(2), "pool": pool})
    for way in upsampling.UPSAMPLERS:
        if way not in [c.upsample for c in taken]:
            found[f"hnet-upsample-{way}"] = small_hnet({"rule": Fixed(2), "pool": "mean", "upsample": way})
    return found


EXAMPLES = by_name()


def first_of_each(kind: Callable[[Any], Any]) -> list[str]:
    """The first example of every kind of configuration."""
    found: dict[Any, str] = {}
    for name, cfg in EXAMPLES.items():
        found.setdefault(kind(cfg), name)
    return list(found.values())


def model(cfg: Any) -> LM:
    """A model with random parameters, among which matrices are large, and a tokenizer that its family can have."""
    rng, start = np.random.default_rng(1), {params.ones: np.ones, params.zeros: np.zeros}

    def draw(spec: params.ParamSpec) -> jax.Array:
        if len(spec.shape) > 1 and spec.init is not params.ones:
            return jax.device_put(0.3 * rng.standard_normal(spec.shape, spec.dtype))
        if spec.init in start:
            return jax.device_put(start[spec.init](spec.shape, spec.dtype))
        return spec.init(jax.random.key(1), spec.shape, spec.dtype)

    family = registry.of(cfg)
    tree = params.map_specs(draw, family.spec(cfg))
    return LM(cfg, tree, tokenizers.from_name("bolmo" if family.codec(cfg).pending else "bytes"))


def texts(lm: LM, *lengths: int) -> list[list[int]]:
    """Rows of ids of a text, in which some spaces are an id beyond bytes, where the model has such ids."""
    ids = np.array(lm.tokenizer.encode(TEXT * (1 + sum(lengths) // len(TEXT))))
    spaces = ids == lm.tokenizer.encode(" ")[0]
    if not registry.of(lm.config).codec(lm.config).pending and lm.config.vocab_size > 259:
        ids = np.where(spaces & (np.cumsum(spaces) % 2 == 0), 259, ids)
    ends = np.cumsum(lengths)
    return [ids[end - n : end].tolist() for n, end in zip(lengths, ends)]


def padded(rows: list[list[int]], t: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids i32 [b, t] and the mask bool [b, t] of rows."""
    ids = np.zeros((len(rows), t), np.int32)
    for row, out in zip(rows, ids):
        out[: len(row)] = row
    return ids, np.arange(t)[None] < np.array([[len(row)] for row in rows])


@functools.cache
def example(name: str) -> LM:
    """An example with random parameters."""
    return model(EXAMPLES[name])


def under(name: str, chosen: Any) -> Any:
    """The configuration of an example with this `memory`. Raises AtomError where no layer can have it."""
    lm, family = example(name), registry.of(EXAMPLES[name])
    # With what the policy learns: only the layers are in question.
    learned = params.abstract(family.spec(family.with_memory(lm.config, chosen)))
    return registry.with_memory(dataclasses.replace(lm, params=learned), chosen).config


def publish(name: str) -> None:
    """What `save_hf` does before it writes. Raises AtomError where the published format lacks something."""
    lm = example(name)
    published = registry.of(lm.config).published
    if published is None:
        raise AtomError(f"models of family {lm.family} have no Hugging Face format here")
    published.to_hf(lm.config, "float32")
    families.ExportSource(lm.config, lm.params)


# What an example may refuse, by the heading of its column. Whatever is not here works in all of them.
CAPABILITIES: dict[str, Callable[[str], Any]] = {
    "cache policies": lambda name: under(name, small(ANY)),
    "lasting memory": lambda name: inside.of(example(name).config),
    "Hugging Face directory": publish,
}


@functools.cache
def refusal(name: str, what: str) -> str:
    """The sentence with which an example refuses; "" where it doesn't."""
    try:
        CAPABILITIES[what](name)
    except AtomError as e:
        return str(e)
    return ""


def layers(name: str) -> list[int]:
    """Numbers of the layers of an example that any policy goes to, the first four."""
    probe = next(kind for kind in policies.POLICIES.values() if not kind.slides)
    found = []
    for number in range(4):
        with contextlib.suppress(AtomError):
            under(name, PerLayer(None, ((number, small(probe)),)))
            found.append(number)
    return found


def dealt() -> dict[str, tuple[str, Any]]:
    """An example and its `memory`, by a name: every policy with an example of each kind of model, in turn, and every
    example that takes any with at least one. Where an example gets several, its layers share them."""
    of_kind: dict[type, list[str]] = {}
    for name, cfg in EXAMPLES.items():
        if not refusal(name, "cache policies"):
            of_kind.setdefault(type(cfg), []).append(name)
    out, known = {}, list(policies.POLICIES.values())
    for names in of_kind.values():
        for i, name in enumerate(names):
            mine = [known[j % len(known)] for j in range(i, max(len(names), len(known)), len(names))]
            places = layers(name) if len(mine) > 1 else [0]
            for at in range(0, len(mine), len(places)):
                some = [small(kind) for kind in mine[at : at + len(places)]]
                chosen = PerLayer(some[0], tuple(zip(places[1:], some[1:]))) if len(some) > 1 else some[0]
                out["-".join((name, *(policy.name for policy in some)))] = name, chosen
    return out


@functools.cache
def refused(name: str, kind: type[Policy]) -> str:
    """The sentence with which an example refuses a kind of policy; "" where it doesn't."""
    policy = small(kind)
    try:
        under(name, policy)
    except AtomError as e:
        return str(e)
    return ""


HEAD = """# What every kind of model does

The small examples of every family of texts (`Family.examples`) together take every path of it. `tests/contract` finds
them and all policies in the registries and tries each of them: `info`, reading, generation (a row of a batch is what
it is alone), later turns, saving and loading and both Flax modules work in all, and `--compile_only` in every family.
Models of worlds and of images read no text; docs/world.md and docs/images.md say what they do.
Cache policies run in every kind of model but recurrent memory transformers (rmt), whose layers see one segment: in
layers that see everything before them and have their positions in keys (letters t and T of a layout; x layers have
them in the scores). Those that look at the ids of tokens see the one at a unit's mark. A lasting memory
(docs/lasting.md) has the entries of such layers of the innermost network.

What an example refuses, it refuses with the sentence that stands here. `python -m tests.contract.cells` writes this
page.
"""


def table() -> str:
    """The text of docs/families.md."""
    lines = [
        "| family | example | units | " + " | ".join(CAPABILITIES) + " |",
        "|---" * (3 + len(CAPABILITIES)) + "|",
    ]
    for name, cfg in EXAMPLES.items():
        stages = len(getattr(cfg, "chunking", ()))
        units = f"{stages} stage{'s' * (stages > 1)}" if stages else "tokens"
        said = [refusal(name, what) or "yes" for what in CAPABILITIES]
        example = name.removeprefix(f"{cfg.family}-")
        lines.append(f"| {cfg.family} | `{example}` | {units} | " + " | ".join(said) + " |")
    return HEAD + "\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(table(), "utf-8")
