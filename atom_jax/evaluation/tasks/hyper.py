"""Hyper-scaling: the accuracy of longer and of more chains of reasoning over what they cost, for cache policies.

After Lancucki et al. (2025). Every policy samples its longest and most chains once; shorter and fewer are parts of
them. Costs are those of all chains of a problem, the prompt counted in each: entries read, and the most entries held
together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from atom_jax import checkpoint, config
from atom_jax.data import puzzles
from atom_jax.evaluation import cache, fronts
from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.metrics import Result, columns
from atom_jax.evaluation.tasks import hyper_grid, hyper_plot, hyper_steps, kv
from atom_jax.inference.scaling import reason
from atom_jax.kvcache import policies
from atom_jax.models import registry
from atom_jax.models.fingerprint import fingerprint
from atom_jax.session import sampling
from atom_jax.session.queue import Made
from atom_jax.terminal import progress
from atom_jax.typing import LM, AtomError

COSTS = ("reads", "peak")


@dataclasses.dataclass(frozen=True)
class HyperSettings:
    """What is compared, and on what.

    puzzle, split, problems: so many of this kind (`data.puzzles`). lengths, chains: the grid. temperature, min_p: as
        of `generate`.
    policies, budgets: as of `kv`, each policy with all budgets; all of them make one front. protect: "prompt" keeps
        the problem's own entries, beside which the others choose; "none" leaves them to the policy.
    adapters: of this model, or checkpoints of it with learned memory; one front for each kind. learned: how each of
        them runs: "model", as it has learned to, and policies with what it has learned, such as revised:form=model.
    rivals: checkpoints of other reasoners, one front for each.
    steps: chains of the program by which each kind of step is judged. rows: chains at a time. draws: of the
        bootstrap.
    """

    puzzle: str = "subset:least=8"
    split: str = "test"
    problems: int = 400
    lengths: tuple[int, ...] = (64, 96, 128, 192, 256, 384, 512, 768, 1024)
    chains: tuple[int, ...] = (1, 2, 4, 8)
    temperature: float = 1.0
    min_p: float = 0.4
    policies: tuple[str, ...] = ("none", "tova", "h2o", "streaming_llm", "quest:page=8")
    budgets: tuple[int, ...] = (192, 128, 96, 64, 48, 32)
    protect: str = "prompt"
    adapters: tuple[str, ...] = ()
    learned: tuple[str, ...] = ("model",)
    rivals: tuple[str, ...] = ()
    steps: int = 64
    rows: int = 64
    draws: int = 1000
    seed: int = 0

    def __post_init__(self):
        some, share, seed = (1, 2**24), (0, 1), (0, 2**31 - 1)
        config.check(
            self, problems=some, lengths=(2, 2**24), chains=some, temperature=(0, 1e6), min_p=share, budgets=some,
            steps=(0, 2**20), rows=some, draws=some, seed=seed,
        )  # fmt: skip
        for name, known in (("protect", ("prompt", "none")), ("split", ("train", "validation", "test"))):
            if getattr(self, name) not in known:
                raise AtomError(f"hyper.{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("lengths", "chains", "budgets"):
            values = getattr(self, name)
            if not values or sorted(set(values)) != sorted(values):
                raise AtomError(f"hyper.{name}: expected different numbers, got {values}")


@dataclasses.dataclass(frozen=True)
class Method:
    """A model with a memory. front: the name of its front; budget: its entries, or what tells it from others. judged:
    whether what it says without a cache is not that of another method."""

    front: str
    budget: Any
    lm: LM
    judged: bool = False


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Fronts of accuracy over cost."""

    settings = HyperSettings()

    def run(self, lm: LM, settings: HyperSettings, encoder: Encoder, out: pathlib.Path | None) -> Result:
        """Rows, fronts, gaps and steps in the notes. With `out`, finished problems are kept in OUT.cells.jsonl, and
        a picture is drawn next to it."""
        puzzle = puzzles.parse(settings.puzzle)
        corpus = puzzles.Generated(puzzle, settings.split)
        problems = [corpus.pose(i)[0] for i in range(settings.problems)]
        prompts = [puzzle.prompt(problem) for problem in problems]
        check_words(lm, prompts[0])
        longest = max(len(lm.tokenizer.encode(p)) for p in prompts) + len(lm.tokenizer.front)
        if longest + max(settings.lengths) > lm.config.max_length:
            raise AtomError(f"hyper.lengths: {max(settings.lengths)} is beyond the model's {lm.config.max_length}")
        if settings.learned != HyperSettings.learned and not settings.adapters:
            raise AtomError("hyper.learned: has no meaning without hyper.adapters")
        chosen = methods(lm, settings, longest, prompts[0])
        path = out and out.with_name(out.name + ".cells.jsonl")
        with contextlib.closing(cache.Lines(path, {"key": str, "problem": int, "grid": dict})) as lines:
            found = [_sampled(method, puzzle, problems, prompts, settings, lines) for method in chosen]
        rows = [row for method, one in zip(chosen, found) for row in _rows(method, one, settings)]
        gaps = _gaps(chosen, found, settings)
        judged = [method for method in chosen if method.judged and settings.steps]
        steps = {_name(m): hyper_steps.judge(m.lm, puzzle, settings.steps) for m in judged}
        notes = {"rows": rows, "fronts": _fronts(rows), "gaps": gaps, "steps": steps}
        if out is not None:
            hyper_plot.draw(rows, notes["fronts"], out.with_suffix(".png"))
        return Result({}, settings.problems, notes, table(rows, gaps, steps, settings))


def check_words(lm: LM, prompt: str) -> None:
    """Raises AtomError for a model whose tokenizer lacks the words of a problem."""
    ids = np.zeros(1, int) if lm.tokenizer is None else lm.tokenizer.encode(prompt)
    known = lm.tokenizer is not None and ids.max(initial=0) < lm.config.vocab_size
    if not known or lm.tokenizer.decode(ids) != prompt:
        raise AtomError(f"the model's tokenizer lacks words of a problem such as {prompt!r}")


def methods(lm: LM, settings: HyperSettings, prompt: int, problem: str) -> list[Method]:
    """The model with everything kept, with the policies, the adapters, and the rivals. prompt: most tokens of a
    problem, such as `problem`.

    Raises AtomError for unknown policies, adapters that were made for another model, and rivals that lack its words.
    """
    plain = dataclasses.replace(lm, config=registry.of(lm.config).with_memory(lm.config, None))
    out = []
    for method in kv.methods(kv.KvSettings(policies=settings.policies, budgets=settings.budgets), plain.config):
        memory = method.memory
        if memory is not None and settings.protect == "prompt" and hasattr(memory, "sinks"):
            memory = dataclasses.replace(memory, sinks=prompt)
        front = method.name.partition(":")[0]
        out.append(Method(front, method.budget, registry.with_memory(plain, memory), judged=front == "none"))
    for path in settings.adapters:
        out += _learned(lm, path, settings)
    for path in settings.rivals:
        rival = checkpoint.load(path)
        check_words(rival, problem)
        out.append(Method(os.path.basename(os.path.normpath(path)), None, rival, judged=True))
    return out


def _learned(lm: LM, path: str, settings: HyperSettings) -> list[Method]:
    """A checkpoint with learned memory, as the settings run it."""
    learned, out = kv.with_learned(lm, path, "hyper.adapters"), []
    for name in kv.joined(settings.learned):
        run = learned if name == "model" else registry.with_memory(learned, policies.parse(name))
        if not registry.learned(run.config):
            raise AtomError(f"hyper.learned: {name} uses nothing of what {path} has learned")
        memory = registry.of(run.config).memory(run.config)
        budget = path if name == "model" else f"{path} {name}"
        out.append(Method(getattr(memory, "name", "learned"), budget, run, judged=name == "model"))
    return out


def _name(method: Method) -> str:
    return method.front if method.budget is None else f"{method.front} {method.budget}"


def _sampled(
    method: Method, puzzle: puzzles.Puzzle, problems: list, prompts: list[str], settings: HyperSettings,
    lines: cache.Lines,
) -> list[dict[str, Any]]:  # fmt: skip
    """The grid of every problem; what `lines` has is not sampled again."""
    what = {n: getattr(settings, n) for n in ("puzzle", "split", "lengths", "chains", "temperature", "min_p", "seed")}
    text = json.dumps([fingerprint(method.lm), config.to_json(what)], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    shape = len(settings.lengths), len(settings.chains)
    mine = (row for row in lines.rows if row["key"] == key)
    done = {row["problem"]: row["grid"] for row in mine if hyper_grid.is_grid(row["grid"], shape)}
    width, length = max(settings.chains), max(settings.lengths)
    bar = progress(
        total=len(problems) * width, initial=sum(i in done for i in range(len(problems))) * width, desc=_name(method),
        unit="chain",
    )  # fmt: skip
    left = [i for i in range(len(problems)) if i not in done]
    chains: dict[int, list[Made | None]] = {i: [None] * width for i in left}

    def ended(p: int, w: int, made: Made) -> None:
        i = left[p]
        chains[i][w] = made
        bar.update()
        if None in chains[i]:
            return
        whole = chains.pop(i)
        votes = [puzzle.answer(method.lm.tokenizer.decode(one.ids)) if one.ended else None for one in whole]
        solves = lambda answer: puzzle.solves(problems[i], answer)  # noqa: E731
        done[i] = hyper_grid.grid(whole, votes, solves, settings.lengths, settings.chains)
        lines.append([{"key": key, "method": _name(method), "problem": i, "grid": done[i]}])

    with bar:
        if left:
            # A problem has its key whatever else is sampled with it.
            keys = sampling.row_keys(jax.random.key(settings.seed), len(problems))[np.array(left)]
            reason(
                method.lm, [prompts[i] for i in left], width, length, settings.temperature, keys,
                min_p=settings.min_p, extract=puzzle.answer, rows=settings.rows, on_end=ended,
            )  # fmt: skip
            # A process may map only so much memory (vm.max_map_count), and every policy has programs of its own.
            jax.clear_caches()
    return [done[i] for i in range(len(problems))]


def _rows(method: Method, found: list[dict[str, Any]], settings: HyperSettings) -> list[dict[str, Any]]:
    """One for every cell of the grid: means over problems."""
    arrays = {name: np.array([one[name] for one in found], np.float64) for name in found[0]}
    out = []
    for i, length in enumerate(settings.lengths):
        for j, chains in enumerate(settings.chains):
            mean = {name: float(x[:, i, j].mean()) for name, x in arrays.items()}
            p, n = mean["right"], len(found)
            out.append({
                "policy": method.front, "budget": method.budget, "length": length, "chains": chains, "accuracy": p,
                "stderr": float(np.sqrt(p * (1 - p) / n)), "any": mean["any"], "finished": mean["finished"] / chains,
                "reads": mean["reads"], "peak": mean["peak"], "held": mean["held"],
            })  # fmt: skip
    return out


def _fronts(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By policy and cost: the rows that none beats at no greater cost."""
    out: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in dict.fromkeys(row["policy"] for row in rows):
        mine = [row for row in rows if row["policy"] == name]
        accuracy = np.array([row["accuracy"] for row in mine])
        out[name] = {
            cost: [mine[i] for i in fronts.front(accuracy, np.array([row[cost] for row in mine]))] for cost in COSTS
        }
    return out


def _gaps(chosen: list[Method], found: list, settings: HyperSettings) -> list[dict[str, Any]]:
    """Every front against the model that keeps everything, and the learned ones against every other."""

    def points(name: str, cost: str) -> fronts.Points:
        mine = [one for method, one in zip(chosen, found) if method.front == name]
        of = lambda what: np.concatenate([  # noqa: E731
            np.array([grid[what] for grid in one], np.float64).reshape(len(one), -1).T for one in mine
        ])  # fmt: skip
        return fronts.Points(of("right"), of(cost))

    names = list(dict.fromkeys(method.front for method in chosen))
    learned = [name for name in names if any(m.front == name and isinstance(m.budget, str) for m in chosen)]
    pairs = [(name, "none") for name in names if name != "none"]
    pairs += [(name, other) for name in learned for other in names if other not in ("none", name)]
    out = []
    for name, base in pairs:
        for cost in COSTS:
            gap = fronts.gap(points(name, cost), points(base, cost), settings.draws, settings.seed)
            out.append({"policy": name, "base": base, "cost": cost, **gap._asdict()})
    return out


def table(rows: list[dict], gaps: list[dict], steps: dict[str, dict], settings: HyperSettings) -> str:
    """The results as lines of text: accuracy at the largest length, gaps, and steps."""
    widths = sorted({row["chains"] for row in rows})
    lines = [("policy", "budget", *(f"{w} chains" for w in widths), "finished", "held", "reads/1", "peak/1")]
    longest = [row for row in rows if row["length"] == max(settings.lengths)]
    for name, budget in dict.fromkeys((row["policy"], row["budget"]) for row in longest):
        mine = {row["chains"]: row for row in longest if (row["policy"], row["budget"]) == (name, budget)}
        one = mine[min(mine)]
        cells = [f"{mine[w]['accuracy']:.3f}" for w in widths]
        costs = [f"{one['finished']:.2f}", f"{one['held']:.0f}", f"{one['reads']:,.0f}", f"{one['peak']:,.0f}"]
        lines.append((name, "-" if budget is None else str(budget), *cells, *costs))
    out = [columns(lines, 2)]
    if gaps:
        lines = [("front", "over", "cost", "points", "95% interval", "linear")]
        for gap in gaps:
            bounds = f"[{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"
            lines.append((gap["policy"], gap["base"], gap["cost"], f"{100 * gap['value']:+.1f}", bounds,
                          f"{100 * gap['linear']:+.1f}"))  # fmt: skip
        out.append(columns(lines, 3))
    if steps:
        kinds = list(next(iter(steps.values())))
        lines = [("steps right", *kinds)]
        lines += [(name, *(f"{100 * one[kind]:.2f}%" for kind in kinds)) for name, one in steps.items()]
        out.append(columns(lines, 1))
    return "\n\n".join(out)
