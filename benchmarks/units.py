"""Learned units next to models without: quality at matched training compute, speed and what it is made of.

    python -m benchmarks.units [--config=configs/units.py] [--variants=hnet,...,bytes,bpe] [--workdir=runs/units]
                               [--set train.steps=400] [--out=FILE.json]
    python -m benchmarks.units --large    # generation at 118M parameters, with random weights

Each variant is trained (or found trained) in WORKDIR/VARIANT, judged on the whole validation text of its data, and
timed: training steps, and generation of single bytes for one row and for eight. The columns:

flops     forward operations per byte, in millions (`models.family.Family.flops`); training costs three times that.
MB/byte   weights to read for one more byte of one row: those of the byte level, and those of the units divided by
          the bytes per unit. The released H-Net code reads the same weights, but serves one row only.
bits      per byte of the validation text.
unit      bytes per unit there; for BPE, per token. edge: the share of units that begin at the edge of a word.
train     bytes per second, the first step left out.
gen 1, 8  bytes per second with one row and with eight; a batch costs 8 * gen1 / gen8 times one row.

With --large nothing is trained. Units are of four bytes (megabyte), or end at random, at about one byte in five
(words: random weights make random bytes, of which a fifth count as white space).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

import atom_jax
from atom_jax import config, params
from atom_jax.chunking.rules.spaces import Spaces
from atom_jax.data.config import DataConfig
from atom_jax.data.sources import open_source
from atom_jax.evaluation import run
from atom_jax.evaluation.reports import units as units_lib
from atom_jax.evaluation.tasks import EvalConfig
from atom_jax.files import write_text
from atom_jax.inference.generate import Generation
from atom_jax.models import registry
from atom_jax.models.hnet import HNetConfig
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.training import record
from atom_jax.typing import LM, AtomError
from benchmarks import command

CONFIG = flags.DEFINE_string("config", "configs/units.py", "File of variants.")
VARIANTS = flags.DEFINE_list("variants", ["words", "entropy", "gumbel", "hnet", "bytes_ngrams", "bytes", "bpe"], "")
WORKDIR = flags.DEFINE_string("workdir", "runs/units", "Where the runs are, one directory each.")
SET = flags.DEFINE_multi_string("set", [], "Changes to every variant, as for train.py.")
NEW = flags.DEFINE_integer("new_tokens", 256, "Tokens to generate per row.", lower_bound=2)
REPEATS = flags.DEFINE_integer("repeats", 9, "Measurements of generation, of which the median counts.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "Also write the rows to this JSON file.")
LARGE = flags.DEFINE_bool("large", False, "Instead of all this: generation of large models with random weights.")
# Bytes of validation text from which lengths of units are taken.
SAMPLE = 20_000


def measure(variant: str, workdir: pathlib.Path, settings: list[str]) -> dict[str, Any]:
    """Trains a variant where that has not been done, and measures it."""
    folder = workdir / variant
    command = [sys.executable, "train.py", f"--config={CONFIG.value}:{variant}", f"--workdir={folder}"]
    if subprocess.run([*command, *(f"--set={s}" for s in settings)]).returncode:
        raise AtomError(f"--variants: {variant} could not be trained")
    exp = config.override(config.load_file(f"{CONFIG.value}:{variant}"), settings)
    lm = atom_jax.load(folder)
    bits = run.evaluate(lm, ["bpb"], run.resolve(EvalConfig(), str(folder)))["bpb"].metrics["bpb"].value
    unit, edge = _lengths(lm, exp.data)
    lines = [line for line in record.read(folder / "metrics.jsonl") if line["kind"] == "train"]
    rates = [line["bytes_per_second"] for line in lines if "bytes_per_second" in line]
    per_token = unit if not isinstance(lm.config, HNetConfig) and lm.tokenizer.name != "bytes" else 1.0
    one, eight = _generation(lm)
    spec = registry.of(lm.config).spec(lm.config)
    return {
        "variant": variant,
        "parameters": params.count(spec),
        "flops": registry.of(lm.config).flops(lm.config, exp.data.seq_len) / per_token / 1e6,
        "megabytes": _read(lm, spec, unit) / per_token / 1e6,
        "bits": bits,
        "unit": unit,
        "edge": edge,
        "train": statistics.median(rates) if rates else 0.0,
        "gen1": one * per_token,
        "gen8": eight * per_token,
    }


def measure_large(variant: str) -> dict[str, Any]:
    """Generation of a variant at 118M parameters."""
    exp = config.load_file(f"configs/units.py:{variant}")
    cfg = dataclasses.replace(
        exp.model, layout=("T2", "T8", "T2"), d_model=(512, 1024), d_intermediate=(1365, 2730), n_heads=(8, 16),
        tie_embeddings=False,
    )  # fmt: skip
    ends = range(cfg.vocab_size // 5)
    if variant == "words":
        chunking = dataclasses.replace(cfg.chunking[0], rule=Spaces(characters=tuple(ends)))
        cfg = dataclasses.replace(cfg, chunking=(chunking,))
    spec = registry.of(cfg).spec(cfg)
    lm = LM(cfg, params.init(jax.random.key(0), spec), ByteTokenizer())
    one, eight = _generation(lm)
    made = [i in ends for row in _generate(lm, 8).ids for i in row]
    unit = len(made) / max(sum(made), 1) if variant == "words" else cfg.chunking[0].rule.stride
    return {"variant": variant, "parameters": params.count(spec), "unit": unit, "gen1": one, "gen8": eight}


def _lengths(lm: LM, data: DataConfig) -> tuple[float, float]:
    """Bytes per unit of the outermost stage (or per token), and the share of units at word edges."""
    corpus = open_source(data.sources[0], "validation")
    text = b"".join(corpus.read(i) for i in range(len(corpus)))[:SAMPLE]
    found = units_lib.units(lm, text.decode("utf-8", "ignore").encode(), data.seq_len)
    facts = units_lib.statistics(found, 0)
    return facts["bytes_per_unit"], facts["at_word_edge"]


def _read(lm: LM, spec: Any, unit: float) -> float:
    """Bytes of weights behind one more token of one row: of the tables only the head's."""
    flat = {k: s for k, s in params.flatten(spec).items() if "vocab" not in s.axes}
    inner = params.count({k: s for k, s in flat.items() if k.startswith("stage") and not k.startswith("stage0")})
    head = lm.config.vocab_size * (lm.config.d_model[0] if isinstance(lm.config, HNetConfig) else lm.config.d_model)
    return 4 * (params.count(flat) - inner + head + inner / unit)


def _generation(lm: LM) -> tuple[float, float]:
    """Tokens per second, all rows together, after the prompt and without compilation: with one row and with eight,
    which take turns."""
    runs = [[_generate(lm, rows).stats["tokens_per_second"] for rows in (1, 8)] for _ in range(REPEATS.value)]
    one, eight = (statistics.median(rates) for rates in zip(*runs))
    return one, eight


def _generate(lm: LM, rows: int) -> Generation:
    prompts = [
        "It was the best of times",
        "She had been",
        "A",
        "There was no doubt that",
        "The",
        "My dear",
        "I",
        "He",
    ]
    return atom_jax.generate(lm, prompts[:rows], NEW.value, temperature=1.0, key=jax.random.key(0), stop_ids=())


# Heads of the table's columns, and their cells.
COLUMNS = {
    "variant": lambda r: r["variant"],
    "parameters": lambda r: f"{r['parameters'] / 1e6:.1f}M",
    "flops/byte": lambda r: f"{r['flops']:.2f}M",
    "MB/byte": lambda r: f"{r['megabytes']:.1f}",
    "bits/byte": lambda r: f"{r['bits']:.3f}",
    "bytes/unit": lambda r: f"{r['unit']:.2f}",
    "edge": lambda r: f"{r['edge']:.2f}",
    "train B/s": lambda r: f"{r['train']:,.0f}",
    "gen 1 B/s": lambda r: f"{r['gen1']:,.0f}",
    "gen 8 B/s": lambda r: f"{r['gen8']:,.0f}",
    "batch 8 costs": lambda r: f"{8 * r['gen1'] / r['gen8']:.2f}x",
}
GENERATION = ("variant", "parameters", "bytes/unit", "gen 1 B/s", "gen 8 B/s", "batch 8 costs")


def table(rows: list[dict[str, Any]], names: Sequence[str] = tuple(COLUMNS)) -> str:
    """The rows in Markdown."""
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(COLUMNS[name](row) for name in names)} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Prints the table, anew after every row."""
    rows = []
    for variant in ("megabyte", "words") if LARGE.value else VARIANTS.value:
        if LARGE.value:
            rows.append(measure_large(variant))
        else:
            rows.append(measure(variant, pathlib.Path(WORKDIR.value), SET.value))
        print(table(rows, GENERATION if LARGE.value else tuple(COLUMNS)), flush=True)
        if OUT.value:
            write_text(OUT.value, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    command.run("units", main)
