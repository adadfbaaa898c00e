"""What every kind of model is expected to do, as cells that the registries span: (family, example) x capability."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import atom_jax
from atom_jax import params, tokenizers
from atom_jax.kvcache.policies import POLICIES
from atom_jax.kvcache.policy import Policy
from atom_jax.models import registry
from atom_jax.typing import LM, AtomError

EXAMPLES = {
    f"{family.name}-{name}": cfg for family in registry.FAMILIES.values() for name, cfg in family.examples().items()
}


@functools.cache
def model(name: str) -> LM:
    """An example with random parameters. Its tokenizer is one that its family can have."""
    cfg = EXAMPLES[name]
    return with_parameters(cfg)


def with_parameters(cfg: Any) -> LM:
    """A model of this configuration, large values so that little is likely twice."""
    family = registry.of(cfg)
    p = params.init(jax.random.key(0), family.spec(cfg))
    kind = "bolmo" if family.codec(cfg).pending else "bytes"
    return LM(cfg, p, tokenizers.from_name(kind))


def policy(kind: type[Policy]) -> Policy:
    """A small one of its kind: those with a budget have to be told it."""
    try:
        return kind()
    except AtomError:
        return kind(budget=8)


def prompts(lm: LM, *lengths: int) -> list[list[int]]:
    """Prompts of these lengths whose ids the model's text may hold: printable characters, in the tokenizer's ids."""
    rng = np.random.default_rng(0)
    text = bytes(rng.choice(np.frombuffer(b"etaoin shrdlu, cmfwyp", np.uint8), sum(lengths)))
    ids, out = lm.tokenizer.encode(text), []
    for n in lengths:
        out.append([int(i) for i in ids[:n]])
        ids = ids[n:]
    return out


def under(name: str, which: str) -> LM:
    """The example under a policy, whose parameters are drawn."""
    cfg, memory = EXAMPLES[name], policy(POLICIES[which])
    registry.with_memory(dataclasses.replace(model(name), params=_enough(cfg, memory)), memory)
    return with_parameters(registry.of(cfg).with_memory(cfg, memory))


def _enough(cfg: Any, memory: Policy) -> Any:
    family = registry.of(cfg)
    return params.init(jax.random.key(0), family.spec(family.with_memory(cfg, memory)))


def publish(name: str, directory: Any) -> None:
    """Writes the example as its family is published."""
    family = registry.of(EXAMPLES[name])
    if family.published is None:
        raise AtomError(f"a {family.name} is not published in any format")
    atom_jax.save_hf(model(name), directory)


def evict(name: str) -> None:
    """Puts a policy on the example, without running it."""
    under(name, "tova")


CAPABILITIES: dict[str, Callable[[str], Any]] = {"cache policies": evict, "Hugging Face directory": publish}


def refusal(name: str, what: str, *args: Any) -> str:
    """The sentence with which an example refuses; "" where it doesn't."""
    try:
        CAPABILITIES[what](name, *args)
    except AtomError as e:
        return str(e)
    return ""


def table() -> str:
    """docs/families.md: what which example refuses, and with which sentence."""
    with tempfile.TemporaryDirectory() as home:
        rows = []
        for i, (name, cfg) in enumerate(EXAMPLES.items()):
            said = [refusal(name, "cache policies"), refusal(name, "Hugging Face directory", f"{home}/{i}")]
            rows.append(f"| `{cfg.family}` | `{name.removeprefix(cfg.family)[1:]}` | " + " | ".join(
                text or "yes" for text in said
            ) + " |")  # fmt: skip
    head = ["| family | example | cache policies | Hugging Face directory |", "|---|---|---|---|"]
    return "\n".join([*TEXT, *head, *rows]) + "\n"


TEXT = (
    "# What every kind of model does",
    "",
    "The small examples of every family (`Family.examples`) are tested alike by `tests/contract`:",
    "they compute, generate alone and in batches, go on in later turns, show their units, are saved and loaded,",
    "compiled without weights, and are Flax modules. Every cache policy runs in every family. What a kind of model",
    "refuses, it refuses with the sentence in this table, which `python -m tests.contract.cells` prints.",
    "",
)

if __name__ == "__main__":
    print(table(), end="")
