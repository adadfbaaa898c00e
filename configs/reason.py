"""A small reasoner: subset sums by backtracking (data/puzzles/subset.py), better with longer and with more chains;
and the same with learned memory.

    python train.py --config=configs/reason.py:subset --workdir=runs/reason
    python train.py --config=configs/reason.py:dms_4x --workdir=runs/reason-dms4

`make reason` runs all of it, compares and draws.
"""

from __future__ import annotations

import dataclasses

from atom_jax.data.config import DataConfig
from atom_jax.kvcache.dmc import DMC
from atom_jax.kvcache.dms import DMS
from atom_jax.models.transformer import TransformerConfig
from atom_jax.training.config import Experiment, Group, OptimConfig, TrainConfig
from atom_jax.training.objectives import Distill, Fit, NextToken

WORDS = "words:256"


def model(**changes) -> TransformerConfig:
    """0.8 million parameters. Heads that find the latest of many equal letters want unbounded scores: no norms of
    queries and keys."""
    sizes = {"d_model": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "d_ff": 384} | changes
    return TransformerConfig(
        family="llama",
        vocab_size=256,
        tie_embeddings=True,
        max_length=4096,
        bos_id=0,
        eos_ids=(1,),
        pad_id=2,
        **sizes,
    )


def data(*puzzles: str, **options) -> DataConfig:
    """Whole chains with their problems, of which the chains alone are learned."""
    sources = tuple(f"reason:subset:{puzzle}" for puzzle in puzzles)
    return DataConfig(sources=sources, whole=True, prompt_end=";", **options)


def subset(seed: int = 0) -> Experiment:
    """From few numbers to eight, longer rows each time; then what is left, which is subtraction, where targets count
    by how little the model knows of them. At last rows that nearly all chains fit in, and problems of few numbers
    again: only there is the first number often turned."""
    muon = OptimConfig(optimizer="muon", learning_rate=1e-2, schedule="constant", warmup_steps=40)
    short = Experiment(
        model=model(), tokenizer=WORDS, optim=muon, seed=seed,
        data=data("least=3:letters=4", seq_len=256, batch_size=32, seed=10 * seed),
        train=TrainConfig(steps=150, eval_every=150, eval_batches=4),
    )  # fmt: skip
    middle = dataclasses.replace(
        short, data=data("least=3:letters=6", seq_len=512, batch_size=16, seed=10 * seed),
        train=TrainConfig(steps=200, eval_every=200, eval_batches=4), first=short,
    )  # fmt: skip
    falling = dataclasses.replace(muon, schedule="wsd", decay_fraction=0.5, final_fraction=0.02)
    rows = {"seq_len": 1024, "batch_size": 9, "seed": 10 * seed}
    whole = dataclasses.replace(
        short, data=data("least=5:letters=8", "least=8", weights=(1.0, 1.0), **rows),
        optim=falling, train=TrainConfig(steps=1000, eval_every=200, eval_batches=4), first=middle,
    )  # fmt: skip

    def again(first: Experiment, learning_rate: float, steps: int, **fields) -> Experiment:
        return dataclasses.replace(
            first, first=first, objective=NextToken(focus=2.0),
            optim=dataclasses.replace(falling, learning_rate=learning_rate),
            train=dataclasses.replace(whole.train, steps=steps), **fields,
        )  # fmt: skip

    sharper = again(again(whole, 6e-3, 1000), 4e-3, 700)
    sources = {"least=3:letters=4": 0.3, "least=5:letters=8": 1.0, "least=8": 1.0}
    longer = data(*sources, weights=tuple(sources.values()), seq_len=1536, batch_size=6, seed=10 * seed + 1)
    longest = again(sharper, 4e-3, 700, data=longer)
    return again(longest, 3e-3, 600, data=dataclasses.replace(longer, seed=10 * seed + 2))


def second() -> Experiment:
    """Another one: other weights to begin with, other problems and chains."""
    return subset(seed=1)


def window_64() -> Experiment:
    """The same reasoner, taught with layers that see 64 symbols: what recency can do where the model knows of it."""

    def narrow(exp: Experiment) -> Experiment:
        cfg = dataclasses.replace(exp.model, layer_types=("sliding",) * exp.model.n_layers, sliding_window=64)
        return dataclasses.replace(exp, model=cfg, first=exp.first and narrow(exp.first))

    return narrow(subset())


def retrofit(entries: int, cr: float) -> Experiment:
    """Evictors for the trained reasoner, with corrections of its projections where keys may be evicted; everything
    else stays as it is. entries: keys that a head holds at the end of a chain, on average."""
    steps = 900
    return Experiment(
        init_from="runs/reason", tokenizer="",
        memory=DMS(
            form="observed", window=16, scale=1.0, offset=0.0, tau=0.5, bias=True, sinks=1, rank=8, cr=cr, page=16
        ),
        data=data("least=6:letters=8", "least=8", weights=(1.0, 1.0), seq_len=1024, batch_size=6),
        fit=Fit(target="attention", windows=16, calibration=8, entries=entries),
        distill=Distill(direction="both", cr_start=cr, cr_end=1.3 * cr, cr_steps=steps, cool=0.2, remat=False),
        optim=OptimConfig(
            learning_rate=6e-3, warmup_steps=10, final_fraction=0.1, weight_decay=0.0,
            groups=(Group(r"layers/attn/dms/._[ab]", 0.3), Group(r"(?!layers/attn/dms/).*")),
        ),
        train=TrainConfig(steps=steps, eval_every=300, eval_batches=4),
    )  # fmt: skip


def dms_4x() -> Experiment:
    return retrofit(100, 4.0)


def dms_8x() -> Experiment:
    return retrofit(60, 8.0)


def dmc_4x() -> Experiment:
    """Merging in place of eviction."""
    exp = retrofit(100, 4.0)
    memory = DMC(
        "observed", window=16, turned=True, mass=True, scale=1.0, offset=0.0, tau=0.5, bias=True, sinks=1, cr=4.0,
        page=16,
    )  # fmt: skip
    optim = dataclasses.replace(exp.optim, groups=(Group(r"(?!layers/attn/dmc/).*"),))
    return dataclasses.replace(exp, memory=memory, fit=dataclasses.replace(exp.fit, target="output"), optim=optim)


def tiny() -> Experiment:
    exp = subset()
    return dataclasses.replace(
        exp, first=None, objective=None,
        model=model(d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=64),
        data=data("least=3:letters=4:high=20:goal=40", seq_len=128, batch_size=8),
        optim=dataclasses.replace(exp.optim, warmup_steps=5),
        train=TrainConfig(steps=20, log_every=5, eval_every=20, eval_batches=2),
    )  # fmt: skip


VARIANTS = {
    "subset": subset, "second": second, "window_64": window_64, "dms_4x": dms_4x, "dms_8x": dms_8x, "dmc_4x": dmc_4x,
    "tiny": tiny,
}  # fmt: skip
