"""H-Net's published files: its config.json <-> HNetConfig, and its tensor names."""

from __future__ import annotations

from typing import Any

from atom_jax.chunking.rules.cosine import Cosine
from atom_jax.fields import Fields
from atom_jax.kvcache import policies
from atom_jax.models import stack
from atom_jax.models.hnet.config import HNetConfig, chunking
from atom_jax.models.published import Published, named_tokenizer, refuse_unknown
from atom_jax.naming import Rule
from atom_jax.nn.ssd import Mamba2Config
from atom_jax.typing import AtomError

# Bytes per unit that the released models were trained towards, by number of chunking stages.
_TARGETS = {1: 6.0, 2: 3.0}
_OBEYED = {
    "arch_layout", "d_model", "d_intermediate", "vocab_size", "ssm_cfg", "attn_cfg", "tie_embeddings",
    "eos_token_id", "model_type", "atom_tokenizer",
}  # fmt: skip
_SSM = {"d_state": "d_state", "d_conv": "d_conv", "expand": "expand", "headdim": "head_dim", "chunk_size": "chunk"}
_ATTENTION = {"num_heads", "rotary_emb_dim", "window_size"}


def from_hf(data: dict[str, Any], where: str) -> HNetConfig:
    """See `Published`: arch_layout, d_model, d_intermediate, vocab_size, ssm_cfg, attn_cfg, tie_embeddings, and
    eos_token_id where there is one."""
    layout = _flatten(data["arch_layout"], where)
    stages = (len(layout) + 1) // 2
    attention, ssm = (_table(data, name, where) for name in ("attn_cfg", "ssm_cfg"))
    for table, known, place in (
        (data, _OBEYED, where), (attention, _ATTENTION, f"{where}: attn_cfg"), (ssm, _SSM, f"{where}: ssm_cfg"),
    ):  # fmt: skip
        refuse_unknown(table, known, place)
    heads = _numbers(attention, "num_heads", stages, where)
    widths = _numbers(data, "d_model", stages, where)
    fields = Fields(data, where)
    target, vocab = _TARGETS.get(stages - 1, 3.0), fields.size("vocab_size")
    try:
        return HNetConfig(
            vocab_size=vocab,
            layout=layout,
            d_model=widths,
            d_intermediate=_numbers(data, "d_intermediate", stages, where, least=0),
            n_heads=heads,
            rotary_dim=_numbers(attention, "rotary_emb_dim", stages, where, least=0),
            window=_numbers(attention, "window_size", stages, where, least=-1),
            chunking=tuple(chunking(target, 2 / target) for _ in range(stages - 1)),
            ssm=Mamba2Config(**{
                ours: Fields(ssm, f"{where}: ssm_cfg").size(theirs, getattr(Mamba2Config, ours))
                for theirs, ours in _SSM.items()
            }),
            tie_embeddings=fields.flag("tie_embeddings", False),
            eos_ids=fields.ids("eos_token_id", vocab) if "eos_token_id" in data else (255,),
        )  # fmt: skip
    except AtomError as e:
        raise AtomError(e if str(e).startswith(where) else f"{where}: {e}") from None


def to_hf(cfg: HNetConfig, dtype: str) -> dict[str, Any]:
    """See `Published`. The format does not say how a model was trained (targets, capacities), nor the dtype."""
    theirs = chunking()
    for c in cfg.chunking:
        if type(c.rule) is not Cosine or (c.pool, c.mix, c.upsample, c.residual, c.confidence, c.norm) != (
            theirs.pool, theirs.mix, theirs.upsample, theirs.residual, theirs.confidence, theirs.norm,
        ):  # fmt: skip
            raise AtomError("this model finds its units in a way that H-Net's published format cannot say")
    if policies.to_hf(cfg.memory, cfg.family):
        raise AtomError("H-Net's published format has no learned memory")
    if cfg.norm_eps != 1e-5:
        raise AtomError(f"H-Net's published format knows the norm_eps 0.00001 only, this model has {cfg.norm_eps}")
    if cfg.head_bias or cfg.ngrams or cfg.qk_norm or set("".join(cfg.layout)) & set("xlLsSeEfFnNkh"):
        raise AtomError(
            "H-Net's published format has no logit bias, n-gram embeddings, QK norms, landmarks, slots, kNN"
            " attention, fast weights, neural memories, product keys, hashed n-grams or Transformer-XL layers"
        )
    nested: list[Any] = [cfg.layout[cfg.stages - 1]]
    for s in reversed(range(cfg.stages - 1)):
        encoder, decoder = cfg.layouts(s)
        nested = [encoder, nested, decoder]
    # The published code refuses fields that it does not know, and takes heads of 64 for granted.
    heads = {} if cfg.ssm.head_dim == 64 else {"headdim": cfg.ssm.head_dim}
    return {
        "arch_layout": nested,
        "d_model": list(cfg.d_model),
        "d_intermediate": list(cfg.d_intermediate),
        "vocab_size": cfg.vocab_size,
        "ssm_cfg": {"chunk_size": cfg.ssm.chunk, "d_conv": cfg.ssm.d_conv, "d_state": cfg.ssm.d_state,
                    "expand": cfg.ssm.expand, **heads},
        "attn_cfg": {"num_heads": list(cfg.n_heads), "rotary_emb_dim": list(cfg.rotary_dim),
                     "window_size": list(cfg.window)},
        "tie_embeddings": cfg.tie_embeddings,
    }  # fmt: skip


_MAMBA = ("dt_bias", "A_log", "D")
_MIXERS = {
    "m": (
        Rule("mixer.in_proj.weight", "mixer/in_proj", 1),
        Rule("mixer.conv1d.weight", "mixer/conv_w", unit_axis=True),
        Rule("mixer.conv1d.bias", "mixer/conv_b"),
        *(Rule(f"mixer.{name}", f"mixer/{name}") for name in _MAMBA),
        Rule("mixer.norm.weight", "mixer/norm"),
        Rule("mixer.out_proj.weight", "mixer/out_proj", 1),
    ),
    "t": (Rule("mixer.Wqkv.weight", "mixer/qkv", 1), Rule("mixer.out_proj.weight", "mixer/o", 2)),
}
_MLP = (
    Rule("norm2.weight", "norm2"),
    Rule("mlp.fc1.weight", "mlp/fc1", 1),
    Rule("mlp.fc2.weight", "mlp/fc2", 1),
)


def rules(cfg: HNetConfig) -> list[Rule]:
    """See `Published`; in runs of layers {i} counts from the run's first layer."""
    out = [Rule("embeddings.weight", "embed"), Rule("lm_head.weight", "unembed", 1)]
    prefix = "backbone."
    for s in range(cfg.stages):
        ours = f"stage{s}/"
        out.append(Rule(prefix + "pad_dimension", ours + "lift"))
        if s == cfg.stages - 1:
            # The innermost stage is an isotropic stack itself.
            out += _stack(prefix + "main_network.", ours + "main/", cfg.layout[s], cfg.memory)
            break
        for name, layout in zip(("encoder", "decoder"), cfg.layouts(s)):
            out += _stack(f"{prefix}{name}.", f"{ours}{name}/", layout, cfg.memory)
        for name in "qk":
            out.append(Rule(f"{prefix}routing_module.{name}_proj_layer.weight", f"{ours}rule/{name}", 1))
        out += [
            Rule(prefix + "residual_proj.weight", ours + "residual/w", 1),
            Rule(prefix + "residual_proj.bias", ours + "residual/b"),
        ]
        prefix += "main_network."
    return out


def _stack(hf: str, ours: str, layout: str, memory: Any) -> list[Rule]:
    out, first = [Rule(hf + "rmsnorm.weight", ours + "norm")], 0
    learned = [rule.inside("mixer.", "mixer/") for rule in policies.rules(memory)]
    for run, (letter, n) in enumerate(stack.parse(layout)):
        kinds = (
            Rule("norm1.weight", "norm1"),
            *_MIXERS.get(letter.lower(), ()),
            *learned,
            *(_MLP if letter.isupper() else ()),
        )
        out += [rule.inside(f"{hf}layers.{{i}}.", f"{ours}{run}/", first) for rule in kinds]
        first += n
    return out


def _flatten(nested: Any, where: str) -> tuple[str, ...]:
    if isinstance(nested, list) and len(nested) == 1 and isinstance(nested[0], str):
        return (nested[0],)
    if isinstance(nested, list) and len(nested) == 3 and isinstance(nested[0], str) and isinstance(nested[2], str):
        return (nested[0], *_flatten(nested[1], where), nested[2])
    raise AtomError(f"{where}: arch_layout must nest [encoder, [...], decoder] around [main], got {str(nested)[:60]}")


def _table(data: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    if not isinstance(data.get(name), dict):
        raise AtomError(f"{where}: {name} is missing")
    return data[name]


def _numbers(data: dict[str, Any], name: str, n: int, where: str, least: int = 1) -> tuple[int, ...]:
    values = data.get(name)
    good = isinstance(values, list) and all(type(v) is int and v >= least for v in values) and len(values) == n
    if not good:
        raise AtomError(f"{where}: {name} must be {n} integers of at least {least}, got {str(values)[:60]}")
    return tuple(values)


PUBLISHED = Published(
    recognises=lambda data: "arch_layout" in data,
    from_hf=from_hf,
    to_hf=to_hf,
    rules=rules,
    tokenizer=lambda cfg, data, path, find: named_tokenizer(
        data.get("atom_tokenizer", "hnet_bytes"), ("bytes", "hnet_bytes"), path
    ),
)
