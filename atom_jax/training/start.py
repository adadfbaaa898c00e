"""How a run begins: the model of `init_from`, its tokenizer and its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from atom_jax import checkpoint, config, sharding, tokenizers
from atom_jax import params as params_lib
from atom_jax.checkpoint import adapters
from atom_jax.data import vocabulary
from atom_jax.models import registry
from atom_jax.training import byteify, losses
from atom_jax.training.byteify import ByteifyConfig
from atom_jax.training.config import Experiment
from atom_jax.training.losses import Sums
from atom_jax.training.step import summary
from atom_jax.transfer import dms_fit, lessons
from atom_jax.transfer.byteify import Lesson
from atom_jax.typing import LM, AtomError


def configure(reference: str, settings: Sequence[str]) -> Experiment:
    """The experiment of a configuration file, changed by --set. A model left open is taken from `init_from`, with
    `memory` in its configuration, before the settings that concern it are applied.

    Raises AtomError for anything wrong in the file or the settings, and for a `memory` that no model can take."""
    exp = config.load_file(reference)
    if not isinstance(exp, Experiment):
        raise AtomError(f"--config={reference}: expected an Experiment, got {type(exp).__name__}")
    later = [s for s in settings if s.startswith("model.")]
    exp = config.override(exp, [s for s in settings if s not in later])
    if exp.model is None:
        exp = dataclasses.replace(exp, model=_with_memory(_given(exp, "model")[0], exp))
    elif exp.memory is not None:
        raise AtomError("memory is for the model of init_from: where `model` is given, set model.memory")
    return config.override(exp, later)


def _with_memory(model: Any, exp: Experiment) -> Any:
    if exp.memory is None:
        return model
    if not hasattr(model, "memory"):
        raise AtomError(
            f"memory: the model of init_from {exp.init_from}, a {type(model).__name__}, has no such field"
        )
    return dataclasses.replace(model, memory=exp.memory)


def tokenizer(exp: Experiment) -> Any:
    """The tokenizer that the experiment names, or that of `init_from`; for a Bolmo to be made, bytes with the
    subwords of its source. One that has to be trained is made anew every time; the same text gives the same."""
    if exp.byteify is not None:
        return tokenizers.BolmoTokenizer(_described_source(exp.byteify)[1])
    if tokenizers.is_trained(exp.tokenizer):
        return vocabulary.trained_tokenizer(exp.tokenizer, exp.data.sources)
    if exp.tokenizer:
        return tokenizers.from_name(exp.tokenizer)
    found = _given(exp, "tokenizer")[1]
    if found is None:
        raise AtomError(f"init_from {exp.init_from} has no tokenizer: set `tokenizer`")
    return found


def parameters(exp: Experiment, shardings: Any) -> tuple[Any, list[str]]:
    """Parameters to start from, float32, read straight to where they belong, and what is to be said of them: those of
    `init_from`, or, for the first stage of a Bolmo, those that its source gives it.

    Learned evictors (attn/dms) that are absent there take the initial values of the experiment's seed.
    Raises AtomError when another tensor is absent, or differs in shape from the experiment's model.
    """
    if exp.byteify is not None and exp.byteify.stage == 1:
        return _byteified(exp, shardings), [f"a Bolmo made of {exp.byteify.source}"]
    there, _ = _given(exp, "model")
    ours, theirs = (params_lib.flatten(registry.of(c).spec(c)) for c in (exp.model, there))
    new = {name: spec for name, spec in ours.items() if adapters.PART in name and name not in theirs}
    for name in sorted((set(ours) | set(theirs)) - set(new)):
        shapes = [list(spec[name].shape) if name in spec else "absent" for spec in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise AtomError(f"init_from {exp.init_from}: {name} is {shapes[0]} there and {shapes[1]} in this model")
    lm = checkpoint.load(exp.init_from, dtype="float32", shardings=shardings)
    notes = [f"init_from: {line}" for line in config.diff(there, exp.model)]
    if not new:
        return lm.params, notes
    notes.append(f"init_from: {', '.join(new)} absent there, so with initial values")
    leaves = params_lib.flatten(lm.params) | _initial(exp.seed, new, shardings)
    return params_lib.unflatten({name: leaves[name] for name in ours}), notes


def _byteified(exp: Experiment, shardings: Any) -> Any:
    """Parameters of a Bolmo before its first stage, with the tables of its source under "source"."""
    there = _loaded_source(exp.byteify, jax.tree.leaves(shardings)[0].mesh)

    def begin(key: jax.Array, params: Any) -> Any:
        made = lessons.begin(key, LM(there.config, params, None), exp.model)
        return made | {"source": {name: params[name] for name in byteify.TABLES if name in params}}

    shapes = [params_lib.flatten(byteify.tables(c)) for c in (there.config, exp.model.main)]
    for name in sorted(set(shapes[0]) | set(shapes[1])):
        found = [list(s[name].shape) if name in s else "absent" for s in shapes]
        if found[0] != found[1]:
            raise AtomError(
                f"byteify.source {exp.byteify.source}: {name} is {found[0]} there, {found[1]} in model.main"
            )
    return jax.jit(begin, out_shardings=shardings)(jax.random.key(exp.seed), there.params)


def source_bits(exp: Experiment, program: Any, batches: Iterator[dict[str, Any]]) -> float:
    """Bits per byte of the model that a Bolmo is made of, on the text of these batches."""
    there = _loaded_source(exp.byteify, program.mesh)
    subwords, cfg = program.tokenizer.subwords, dataclasses.replace(there.config, dtype=exp.model.dtype)
    lengths, eos = losses.byte_lengths(subwords, cfg.vocab_size), program.tokenizer.document_id

    @jax.jit
    def judge(params: Any, lesson: Lesson) -> Sums:
        return byteify.source_sums(params, lesson, cfg=cfg, lengths=lengths, eos=eos)

    total = [judge(there.params, program.put(batch)) for batch in batches]
    return float(summary(jax.tree.map(lambda *x: sum(x), *total))["bits_per_byte"])


def _loaded_source(how: ByteifyConfig, mesh: Any) -> LM:
    cfg = _described_source(how)[0]
    places = sharding.shardings(registry.of(cfg).spec(cfg), mesh)
    return checkpoint.load(how.source, dtype="float32", shardings=places)


def _described_source(how: ByteifyConfig) -> tuple[Any, Any]:
    """(configuration, tokenizer) of the model that a Bolmo is made of."""
    if not how.source:
        raise AtomError("byteify.source is not set: which model is the Bolmo to be made of?")
    cfg, found = checkpoint.load_config(how.source)
    if not hasattr(found, "pieces"):
        raise AtomError(f"byteify.source {how.source}: has no tokenizer.json, whose subwords a Bolmo needs")
    return cfg, found


def _initial(seed: int, specs: dict[str, params_lib.ParamSpec], shardings: Any) -> dict[str, Any]:
    """Initial values by path, each the same as in a model that starts from the seed altogether."""
    spec = params_lib.unflatten(specs)
    places = None
    if shardings is not None:
        given = params_lib.flatten(shardings)
        places = params_lib.unflatten({name: given[name] for name in specs})
    draw = jax.jit(lambda key: params_lib.init(key, spec), out_shardings=places)
    return params_lib.flatten(draw(jax.random.key(seed)))


def fitted(exp: Experiment, params: Any, data: Iterator[dict[str, Any]]) -> Any:
    """`params` with evictors fitted as `exp.fit` says, on rows of `data`. Raises AtomError without parameters."""
    if params is None:
        raise AtomError("fit: set init_from; evictors are fitted to a model that has learned something")
    bar = tqdm(total=exp.fit.windows + 3 * exp.fit.calibration, desc="fit", unit="row", mininterval=1)
    with bar:
        return dms_fit.fit(params, exp.model, _whole_rows(data, bar), exp.fit, bar.set_postfix_str)


def calibrated(exp: Experiment, params: Any, data: Iterator[dict[str, Any]]) -> Any:
    """`params` with the threshold for evictions moved to where `exp.fit.entries` keys stay."""
    bar = tqdm(total=3 * exp.fit.calibration, desc="threshold", unit="row", mininterval=1)
    with bar:
        return dms_fit.calibrate(params, exp.model, _whole_rows(data, bar), exp.fit, bar.set_postfix_str)


def _whole_rows(data: Iterator[dict[str, Any]], bar: Any) -> Iterator[np.ndarray]:
    """Ids i32 [1, t] of the rows of `data` that hold a single document."""
    for batches in range(10**9):
        if batches > 1000 and not bar.n:
            raise AtomError("fit: no row of the data holds a single document; data.seq_len is too long for them")
        batch = next(data)
        for ids, segments in zip(batch["ids"], batch["segments"]):
            if (segments == 1).all():
                bar.update()
                yield ids[None]


def _given(exp: Experiment, what: str) -> tuple[Any, Any]:
    """(model configuration, tokenizer) of `init_from`."""
    if not exp.init_from:
        raise AtomError(f"{what} is not set, and there is no init_from to take it from")
    return checkpoint.load_config(exp.init_from)
