"""How a run begins: the model of `init_from`, its tokenizer and its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from atom_jax import checkpoint, config, tokenizers
from atom_jax import params as params_lib
from atom_jax.data import vocabulary
from atom_jax.data.pipeline import remarks
from atom_jax.models import lora, registry
from atom_jax.models.transformer import TransformerConfig
from atom_jax.training.config import Experiment
from atom_jax.training.program import Program
from atom_jax.training.state import shardings
from atom_jax.typing import FRAMES, AtomError


def configure(reference: str, settings: Sequence[str]) -> Experiment:
    """The experiment of a configuration file, changed by --set. A model left open is taken from `init_from`, with
    `memory` and `lora` in its configuration, before the settings that concern it are applied.

    Raises AtomError for anything wrong in the file or the settings, and for a `memory` that no model can take."""
    exp = config.load_file(reference)
    if not isinstance(exp, Experiment):
        raise AtomError(f"--config={reference}: expected an Experiment, got {type(exp).__name__}")
    later = [s for s in settings if s.startswith("model.")]
    exp = config.override(exp, [s for s in settings if s not in later])
    if exp.model is None:
        model = _given(exp, "model")[0]
        if exp.memory is not None:
            model = registry.of(model).with_memory(model, exp.memory)
            registry.check_memory(model)
        if exp.lora is not None:
            if not isinstance(model, TransformerConfig):
                raise AtomError(f"lora is for transformers, and {exp.init_from} is of the family {model.family}")
            model = dataclasses.replace(model, lora=exp.lora)
        exp = dataclasses.replace(exp, model=model)
    elif given := [name for name in ("memory", "lora") if getattr(exp, name) is not None]:
        name = given[0]
        raise AtomError(f"{name} is for the model of init_from: where `model` is given, set model.{name}")
    return config.override(exp, later)


def tokenizer(exp: Experiment) -> Any:
    """The tokenizer that an objective needs, that the experiment names, or that of `init_from`; None for worlds. One
    that has to be trained is made anew every time; the same text gives the same. Raises AtomError for one whose ids
    mean something else to the model of `init_from`."""
    if registry.kind(exp.model).reads == FRAMES:
        return None
    needed = [found for objective in exp.objectives if (found := objective.tokenizer(exp)) is not None]
    if needed:
        return needed[-1]
    if not exp.tokenizer:
        found = _given(exp, "tokenizer")[1]
        if found is None:
            raise AtomError(f"init_from {exp.init_from} has no tokenizer: set `tokenizer`")
        return found
    if tokenizers.is_trained(exp.tokenizer):
        trained = vocabulary.trained_tokenizer(exp.tokenizer, exp.tokenizer_texts)
        found = tokenizers.padded(trained, exp.model.vocab_size)
    else:
        found = tokenizers.from_name(exp.tokenizer)
    theirs = _given(exp, "tokenizer")[1] if exp.init_from else None
    if theirs is not None and not tokenizers.same(found, theirs):
        what = f"tokenizer {exp.tokenizer!r} has other ids than that of init_from {exp.init_from}"
        raise AtomError(f"{what}: leave it empty, to keep the latter, or move the model (`transplant`)")
    return found


def begin(program: Program, data: Any) -> tuple[Any, list[str]]:
    """Parameters before the first step, in their places, and what is to be said of them: those of `init_from` after
    what the objectives do; None where all are drawn. data: the rows of the run."""
    exp, places = program.setting.exp, shardings(program.state).params
    params, notes = parameters(exp, places) if exp.init_from else (None, [])
    if program.setting.tokenizer is not None:
        notes += remarks(exp.data, program.setting.tokenizer, sum(data.get_state()["config"]["pieces"]))
    for objective in exp.objectives:
        params, more = objective.begin(program.setting, params, places, data)
        notes += more
    return params if params is None else _completed(params, program.spec, exp.seed, places), notes


def parameters(exp: Experiment, shardings: Any) -> tuple[Any, list[str]]:
    """Parameters of `init_from`, float32, read straight to where they belong, and what is to be said of them.

    What cache policies learn, and LoRA, takes the initial values of the experiment's seed where it is absent there,
    and so does all else where the model there is a part of the experiment's (`Kind.parts`).
    Raises AtomError when another tensor is absent, or differs in shape from the experiment's model.
    """
    there, _ = _given(exp, "model")
    spec = registry.kind(exp.model).spec(exp.model)
    if name := part(exp, there):
        lm = checkpoint.load(exp.init_from, exp.adapter, "float32", None if shardings is None else shardings[name])
        return _completed({name: lm.params}, spec, exp.seed, shardings), [f"init_from: {name} alone"]
    ours, theirs = (params_lib.flatten(tree) for tree in (spec, registry.kind(there).spec(there)))
    learned = registry.learned(exp.model) | lora.paths(exp.model)
    new = [name for name in ours if name in learned and name not in theirs]
    for name in sorted((set(ours) | set(theirs)) - set(new)):
        shapes = [list(found[name].shape) if name in found else "absent" for found in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise AtomError(f"init_from {exp.init_from}: {name} is {shapes[0]} there and {shapes[1]} in this model")
    lm = checkpoint.load(exp.init_from, exp.adapter, "float32", shardings)
    notes = [f"init_from: {line}" for line in config.diff(there, exp.model)]
    if new:
        # Of LoRA there is a pair of tensors for every projection.
        said = dict.fromkeys("layers/lora" if name in lora.paths(exp.model) else name for name in new)
        notes.append(f"init_from: {', '.join(said)} absent there, so with initial values")
    return _completed(lm.params, spec, exp.seed, shardings), notes


def part(exp: Experiment, there: Any) -> str:
    """Of which part of the experiment's model (`Kind.parts`) `init_from` is a run, by name; "" where it is none.
    there: the configuration of `init_from`. Raises AtomError where it is another one than the part's."""
    for name, ours in registry.kind(exp.model).parts(exp.model).items():
        if type(there) is type(ours):
            if differences := config.diff(there, ours):
                said = "; ".join(differences)
                raise AtomError(f"init_from {exp.init_from}: the model's {name} is another one ({said})")
            return name
    return ""


def _completed(params: Any, spec: Any, seed: int, shardings: Any) -> Any:
    """Parameters of which some may be absent: these take initial values, each the same as in a model that starts from
    the seed altogether."""
    leaves, specs = params_lib.flatten(params), params_lib.flatten(spec)
    new = [name for name in specs if name not in leaves]
    if not new:
        return params
    places = None
    if shardings is not None:
        given = params_lib.flatten(shardings)
        places = params_lib.unflatten({name: given[name] for name in new})
    wanted = params_lib.unflatten({name: specs[name] for name in new})
    draw = jax.jit(lambda key: params_lib.init(key, wanted), out_shardings=places)
    leaves |= params_lib.flatten(draw(jax.random.key(seed)))
    return params_lib.unflatten({name: leaves[name] for name in specs})


def _given(exp: Experiment, what: str) -> tuple[Any, Any]:
    """(model configuration, tokenizer) of `init_from`."""
    if not exp.init_from:
        raise AtomError(f"{what} is not set, and there is no init_from to take it from")
    return checkpoint.load_config(exp.init_from, exp.adapter)
