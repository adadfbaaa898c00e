"""What a finished training run achieved: next to baselines that need no training, with a sample and a picture."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shlex
import sys
from typing import Any

import jax

import atom_jax
from atom_jax import config, picture
from atom_jax.data.config import DataConfig
from atom_jax.data.sources import open_source
from atom_jax.evaluation import run
from atom_jax.evaluation.reports import unit_strip
from atom_jax.evaluation.reports import units as units_lib
from atom_jax.evaluation.reports.baselines import ngram_bits_per_byte, xz_bits_per_byte
from atom_jax.evaluation.tasks import EvalConfig
from atom_jax.fields import read_json
from atom_jax.files import write_text
from atom_jax.inference.generate import generate
from atom_jax.models import registry
from atom_jax.training.config import Experiment
from atom_jax.training.record import read
from atom_jax.typing import TEXTS, AtomError

# The baselines hold the text in memory several times over; beyond this many bytes they are left out.
LARGEST = 64 * 2**20
ORDER = 5
# Bytes of the validation text whose units are shown.
SHOWN = 300


@dataclasses.dataclass(frozen=True)
class Summary:
    """Bits per byte of the validation text by name, a sample that the model wrote, the picture's path, and for models
    with learned units a piece of the validation text in units."""

    bits_per_byte: dict[str, float]
    sample: str
    picture: pathlib.Path
    units: units_lib.Units | None = None

    def __str__(self) -> str:
        width = max(map(len, self.bits_per_byte))
        rows = [f"  {name.ljust(width)}  {value:.3f}" for name, value in self.bits_per_byte.items()]
        lines = ["Bits per byte of the validation text (lower is better)", *rows, "", "A sample", self.sample, ""]
        if self.units is not None:
            lines += ["A piece of the validation text in the model's units", units_lib.render(self.units), ""]
        return "\n".join(lines)


def summarize(workdir: str, prompt: str = "It was", sample_tokens: int = 400) -> Summary:
    """Judges the newest checkpoint of a training directory on the whole validation split of its own data.

    The baselines, saved in WORKDIR/baselines.json, are `xz -9e` with the training text as history and a
    Kneser-Ney model of order 5 counted on the training text; both see the same bytes as the model. There are none
    where a program makes the texts, or they are larger than LARGEST.
    Writes WORKDIR/plots/summary.png, and for models with learned units WORKDIR/plots/boundaries.png. Raises AtomError
    when the directory holds no finished checkpoint.
    """
    folder = pathlib.Path(workdir)
    exp = _experiment(folder)
    data, reads = exp.data, registry.kind(exp.model).reads
    if reads != TEXTS:
        raise AtomError(f"{workdir}: summary is for runs on texts; this one was trained on {reads}")
    if data.chat:
        raise AtomError(f"{workdir}: summary is for runs on texts; this one was trained on conversations")
    lm = atom_jax.load(workdir)
    cfg = run.resolve(EvalConfig(), workdir)
    model = run.evaluate(lm, ["bpb"], cfg)["bpb"].metrics["bpb"].value
    scores = {**_baselines(folder, data), f"this model, {_steps(folder)} steps": model}
    sample = generate(lm, [prompt], sample_tokens, temperature=0.8, key=jax.random.key(0))
    curves, units = _draw(folder, scores), None
    if units_lib.learned(lm.config):
        units = units_lib.units(lm, _piece(data), cfg.max_length)
        unit_strip.draw(units, folder / "plots" / "boundaries.png")
    return Summary(scores, prompt + sample.text[0], curves, units)


def next_commands(workdir: str) -> str:
    """Commands worth trying on a training directory."""
    w = shlex.quote(str(workdir))
    here = os.path.relpath(sys.executable)
    python = "python" if here.startswith("..") else here
    exp = _experiment(pathlib.Path(workdir))
    units, beside, convert = "", "", "a directory that transformers loads"
    better = "--config=configs/lm.py:base --workdir=runs/base"
    if units_lib.learned(exp.model):
        units = f'{python} -m atom_jax units --checkpoint={w} --text="It was a truth" --out={w}/units.png'
        better = f"--config=configs/units.py --workdir=runs/longer --set train.steps={4 * exp.train.steps}"
        others = "bytes,bpe,hnet,entropy_ngrams"
        beside = f"{python} -m benchmarks.units --variants={others}    # next to models without units"
        convert = "H-Net's published format" if _published(exp.model) else ""
    commands = [
        units,
        f'{python} -m atom_jax generate --checkpoint={w} --prompt="My dear" --temperature=0.8',
        f"{python} eval.py --checkpoint={w} --tasks=bpb --set bpb.split=test",
        convert and f"{python} -m atom_jax convert {w} {w}/hf        # {convert}",
        f"{python} -m atom_jax info {w}",
        f"{python} train.py {better}    # longer and better",
        beside,
    ]
    return "\n".join(["Try next", *(f"  {command}" for command in commands if command)])


def _published(cfg: Any) -> bool:
    """Whether the published format of its family can say what this model is."""
    try:
        registry.of(cfg).published.to_hf(cfg, "float32")
    except AtomError:
        return False
    return True


def _experiment(folder: pathlib.Path) -> Experiment:
    file = folder / "experiment.json"
    if not file.is_file():
        raise AtomError(f"{folder} is not a training directory: it has no experiment.json")
    return config.from_json(Experiment, read_json(file), str(file))


def _piece(data: DataConfig) -> bytes:
    """About 300 bytes from the middle of the first document of the validation text: whole lines and words where
    there are such, and whole characters."""
    corpora = (open_source(source, "validation") for source in data.sources)
    text = next(corpus.read(i) for corpus in corpora for i in range(len(corpus)) if len(corpus.read(i)))
    begin = max(0, (len(text) - SHOWN) // 2)
    if begin:
        line = text.find(b"\n\n", begin, begin + 4 * SHOWN)
        begin = begin if line < 0 or line + SHOWN > len(text) else line + 2
    end = min(begin + SHOWN, len(text))
    if end < len(text):
        word = text.rfind(b" ", begin + SHOWN // 2, end)
        end = end if word < 0 else word
    # Continuation bytes at either end belong to characters that were cut.
    return text[begin:end].decode("utf-8", "ignore").encode()


def _text(data: DataConfig, split: str) -> bytes | None:
    """All of a split; None where that is more than LARGEST, or a program makes it without an end."""
    parts, size = [], 0
    for corpus in [open_source(source, split) for source in data.sources]:
        if getattr(corpus, "endless", False):
            return None
        for i in range(len(corpus)):
            parts.append(corpus.read(i))
            size += len(parts[-1])
            if size > LARGEST:
                return None
    return b"".join(parts)


def _baselines(folder: pathlib.Path, data: DataConfig) -> dict[str, float]:
    file = folder / "baselines.json"
    if file.is_file():
        return read_json(file)
    train = _text(data, "train")
    text = None if train is None else _text(data, "validation")
    if text is None:
        return {}
    scores = {
        "xz -9e after the training text": xz_bits_per_byte(train, text),
        f"order-{ORDER} Kneser-Ney counts": ngram_bits_per_byte(train, text, ORDER),
    }
    write_text(file, json.dumps(scores, indent=1) + "\n")
    return scores


def _lines(folder: pathlib.Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read(folder / "metrics.jsonl") if line["kind"] == kind]


def _steps(folder: pathlib.Path) -> int:
    return max(line["step"] for line in _lines(folder, "train"))


def _draw(folder: pathlib.Path, scores: dict[str, float]) -> pathlib.Path:
    """The run's bits per byte by step, with every score as a horizontal line."""
    path = folder / "plots" / "summary.png"
    path.parent.mkdir(exist_ok=True)
    with picture.drawn(path, figsize=(8, 4.5)) as (_, ax):
        for kind, style in (("train", "-"), ("validation", "o-")):
            points = [(r["step"], r["bits_per_byte"]) for r in _lines(folder, kind) if r.get("bits_per_byte")]
            if points:
                ax.plot(*zip(*points), style, label=f"{kind}, each row by itself", linewidth=1, markersize=4)
        for (name, value), style in zip(scores.items(), ("--", "-.", ":")):
            ax.axhline(value, linestyle=style, color="black", linewidth=1, label=f"{name}: {value:.2f}")
        ax.set(xlabel="step", ylabel="bits per byte", ylim=(min(scores.values()) - 0.2, 4.5))
        ax.set_title(
            "Level lines: the whole validation text; the model sees half a row or more before each token", fontsize=9
        )
        ax.grid(alpha=0.3)
        ax.legend(loc="upper right")
    return path
