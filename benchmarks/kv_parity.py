"""Cache policies, ours and kvpress's, on the same weights and tokens: nats of what follows a compressed context."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from atom_jax.evaluation import run
from atom_jax.evaluation.metrics import columns
from atom_jax.evaluation.tasks import EvalConfig, kv, kv_cells
from atom_jax.evaluation.tasks.kv import KvSettings
from atom_jax.evaluation.tasks.kv_cells import Ask, Cell, Method
from atom_jax.kvcache import policies
from atom_jax.kvcache.budget import Budget
from atom_jax.terminal import progress
from atom_jax.typing import LM

# Policies that kvpress has too, under other names (`benchmarks.press`).
SHARED = (
    "none", "streaming_llm", "tova", "observed_attention", "snapkv", "pyramidkv", "adakv", "knorm", "keydiff",
    "expected_attention", "kvcompose",
)  # fmt: skip
# Largest difference of mean nats that the order of float32 sums, and near ties between scores, explain.
CLOSE = 1e-3
# Calls one of the peer's methods: name, arguments.
Peer = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One method: mean nats of both sides over all windows (peer: None where it lacks the method), entries held per
    head after the context (mean over layers and heads), and the nats of every window."""

    policy: str
    budget: int | None
    held: float
    nats: float
    peer_held: float | None
    peer_nats: float | None
    windows: list[float]
    peer_windows: list[float] | None

    @property
    def difference(self) -> float | None:
        """Ours minus the peer's."""
        return None if self.peer_nats is None else self.nats - self.peer_nats

    @property
    def agrees(self) -> bool:
        """Whether the peer is close, if there is one."""
        return self.difference is None or abs(self.difference) <= CLOSE


def asks(lm: LM, settings: KvSettings) -> tuple[Ask, ...]:
    """The windows of all sources. Raises AtomError for settings out of range and for sources that can't be read."""
    kv.check(dataclasses.replace(settings, parts=("loss",)), lm.config.max_length)
    encoder = run.make_encoder(lm, EvalConfig())
    return tuple(ask for source in settings.sources for ask in kv.windows(settings, encoder, source))


def compare(
    models: Sequence[tuple[str, LM]], settings: KvSettings, windows: Sequence[Ask], peer: Peer | None
) -> Iterator[Row]:
    """Rows as they are measured.

    models: a model without learned evictors, under the name "", for all policies of the settings, and others with
    their own memory, which run as they are. peer: an open `benchmarks.press.Presses` in its process, or None.
    """
    base = models[0][1]
    chosen = [(m, base) for m in kv.methods(settings, base.config)]
    chosen += [(Method(name, None, lm.config.memory), lm) for name, lm in models[1:]]
    theirs = {} if peer is None else _theirs(peer, [m for m, _ in chosen if _shared(m)], windows)
    tokens = sum(len(a.context) + len(a.target) for a in windows)
    with progress(total=len(chosen) * tokens, desc="ours", unit="tok", unit_scale=True) as bar:
        for method, lm in chosen:
            bar.set_postfix_str(f"{method.name} {method.budget or ''}")
            found = kv_cells.measure(lm, Cell(method, "loss", "", tuple(windows)), 1, bar.update)
            nats = (-np.array(found["logprobs"]) / np.array(found["sizes"])).tolist()
            other = theirs.get((method.name, method.budget))
            yield Row(
                method.name, method.budget, float(np.mean(found["held"])), float(np.mean(nats)),
                None if other is None else float(np.mean([o["held"] for o in other])),
                None if other is None else float(np.mean([o["nats"] for o in other])),
                nats, None if other is None else [o["nats"] for o in other],
            )  # fmt: skip


def _shared(method: Method) -> bool:
    return method.name.partition(":")[0] in SHARED and (method.budget or method.memory is None)


def request(method: Method, length: int) -> dict[str, Any]:
    """What the peer is asked for: the policy with its settings, and the entries to keep of `length`."""
    if method.memory is None:
        return {"policy": "none"}
    name, n = method.memory.name, method.budget
    return {**dataclasses.asdict(method.memory), "policy": name, "keep": n, "compression": compression(n, length)}


def compression(n: int, length: int) -> float:
    """The ratio with which kvpress, which rounds down, keeps n of `length` entries."""
    ratio = 1 - n / length
    return ratio if int(length * (1 - ratio)) == n else 1 - (n + 0.01) / length


def _theirs(peer: Peer, shared: list[Method], windows: Sequence[Ask]) -> dict[tuple, list[dict[str, Any]]]:
    """What the peer finds in every window, by policy and budget."""
    out: dict[tuple, list[dict[str, Any]]] = {(m.name, m.budget): [] for m in shared}
    with progress(total=len(windows), desc="kvpress", unit="window") as bar:
        for ask in windows:
            requests = [request(m, len(ask.context)) for m in shared]
            found = peer("score", ask.context.tolist(), ask.target.tolist(), requests)
            for key, one in zip(out, found, strict=True):
                out[key].append(one)
            bar.update()
    return out


def table(rows: Sequence[Row]) -> str:
    """The rows as lines of text; "*" marks differences that rounding does not explain."""
    lines = [("policy", "budget", "held", "nats", "kvpress held", "kvpress", "difference", "largest of a window", "")]
    for row in rows:
        ours = (row.policy, str(row.budget or "-"), f"{row.held:,.0f}", f"{row.nats:.5f}")
        if row.peer_nats is None:
            lines.append((*ours, "-", "-", "-", "-", ""))
            continue
        worst = max((a - b for a, b in zip(row.windows, row.peer_windows, strict=True)), key=abs)
        theirs = (f"{row.peer_held:,.0f}", f"{row.peer_nats:.5f}", f"{row.difference:+.1e}", f"{worst:+.1e}")
        lines.append((*ours, *theirs, "" if row.agrees else "*"))
    return columns(lines, 2)


def default_policies() -> tuple[str, ...]:
    """Everything with a budget that selects entries, as kvpress's presses do."""
    names = [name for name, p in policies.POLICIES.items() if issubclass(p, Budget) and name != "quest"]
    return ("none", *(f"{name}:first=true" if name == "kvcompose" else name for name in names))
