"""The curves of a run as PNG files."""

from __future__ import annotations

import pathlib

from atom_jax.training import record


def draw(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Draws WORKDIR/metrics.jsonl into WORKDIR/plots and returns the files; none when nothing was logged."""
    lines = record.read(workdir / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    validation = [line for line in lines if line["kind"] == "validation"]
    if not train:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def panel(ax: plt.Axes, name: str, label: str) -> None:
        for kind, rows, style in (("train", train, "-"), ("validation", validation, "o-")):
            points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
            if points:
                ax.plot(*zip(*points), style, label=kind, linewidth=1, markersize=3)
        ax.set(xlabel="step", ylabel=label)
        ax.grid(alpha=0.3)
        if len(ax.lines) > 1:
            ax.legend()

    pages = {
        "loss": {"loss": "nats per token", "bits_per_byte": "bits per byte"},
        "optimizer": {"learning_rate": "learning rate", "grad_norm": "gradient norm"},
        "throughput": {"bytes_per_second": "bytes per second", "tokens_per_second": "tokens per second"},
    }
    (workdir / "plots").mkdir(exist_ok=True)
    files = []
    for page, panels in pages.items():
        figure, axes = plt.subplots(1, len(panels), figsize=(11, 4), layout="constrained")
        for ax, (name, label) in zip(axes, panels.items()):
            panel(ax, name, label)
        files.append(workdir / "plots" / f"{page}.png")
        figure.savefig(files[-1], dpi=120)
        plt.close(figure)
    return files
