"""The curves of a run as PNG files."""

from __future__ import annotations

import pathlib
from typing import Any

from atom_jax import picture
from atom_jax.training import record

# File name -> label of a panel -> metrics drawn in it, each with its meaning where there are several.
Pages = dict[str, dict[str, dict[str, str]]]
_PAGES: Pages = {
    "loss": {"nats per token": {"loss": ""}, "bits per byte": {"bits_per_byte": ""}},
    "optimizer": {"learning rate": {"learning_rate": ""}, "gradient norm": {"grad_norm": ""}},
}
_BITS, _RATE = "_bits_per_byte", "_per_second"
# While a run goes on, its curves are drawn after validations and checkpoints, at least so far apart.
SECONDS = 60.0


def draw(workdir: pathlib.Path, more: Pages | None = None) -> list[pathlib.Path]:
    """Draws WORKDIR/metrics.jsonl into WORKDIR/plots and returns the files; none when nothing was logged. more: pages
    of what an objective reports, also in place of those that every run has. Raises AtomError when one cannot be
    written."""
    lines = record.read(workdir / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    validation = [line for line in lines if line["kind"] == "validation"]
    if not train:
        return []

    def panel(ax: Any, label: str, names: dict[str, str]) -> None:
        for name, meaning in names.items():
            for kind, rows, style in (("train", train, "-"), ("validation", validation, "o-")):
                points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
                if points:
                    of = f"{meaning}, {kind}" if meaning else kind
                    ax.plot(*zip(*points), style, label=of, linewidth=1, markersize=3)
        # Early on units can be as long as a row.
        ax.set(xlabel="step", ylabel=label, yscale="log" if label == "bytes per unit" else "linear")
        ax.grid(alpha=0.3)
        if len(ax.lines) > 1:
            ax.legend()

    stages = sum(name.startswith("bytes_per_unit_") for name in train[-1])
    rates = dict.fromkeys(name for line in train for name in line if name.endswith(_RATE)) or ["tokens_per_second"]
    speed = {f"{name.removesuffix(_RATE)} per second": {name: ""} for name in rates}
    pages = _PAGES | {"throughput": speed} | ({"units": _units_page(stages)} if stages else {}) | (more or {})
    # Of the models that this one is compared with.
    others = {n: n.removesuffix(_BITS) for line in validation[-1:] for n in line if n.endswith(_BITS)}
    if "bits per byte" in pages["loss"]:
        pages["loss"] = pages["loss"] | {"bits per byte": {"bits_per_byte": "", **others}}
    (workdir / "plots").mkdir(exist_ok=True)
    files = []
    for page, panels in pages.items():
        files.append(workdir / "plots" / f"{page}.png")
        with picture.drawn(files[-1], ncols=len(panels), figsize=(11, 4), squeeze=False) as (_, axes):
            for ax, (label, names) in zip(axes[0], panels.items()):
                panel(ax, label, names)
    return files


def _units_page(stages: int) -> dict[str, dict[str, str]]:
    """Panels about learned units: their length, where they begin, and what was lost."""
    of = lambda metric: {f"{metric}_{s}": f"stage {s}" if stages > 1 else "" for s in range(stages)}  # noqa: E731
    return {
        "bytes per unit": of("bytes_per_unit"),
        "share of units that begin at the edge": {"at_word_edge": "of a word", "at_character_edge": "of a character"},
        "lost boundaries per position": of("lost"),
    }
