"""The configuration of a model that chooses its own units, and the parameters that it describes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from atom_jax import config
from atom_jax.chunking import pooling, rules, upsampling
from atom_jax.chunking.config import Chunking
from atom_jax.chunking.rules.cosine import Cosine
from atom_jax.chunking.types import END
from atom_jax.kvcache import policies
from atom_jax.models import stack
from atom_jax.models.hnet import ports
from atom_jax.models.hnet.ports import Bytes
from atom_jax.models.stack import Part, Width
from atom_jax.nn import relative
from atom_jax.nn.ssd import Mamba2Config
from atom_jax.params import ParamSpec, Tree, normal, ones, zeros
from atom_jax.typing import AtomError


@config.register
@dataclasses.dataclass(frozen=True)
class HNetConfig:
    """Sizes per stage, outermost first, the layouts of their stacks, and how each stage finds its units."""

    family: str = "hnet"
    # What goes in and comes out at the outermost positions (models/hnet/ports).
    port: Any = dataclasses.field(default_factory=Bytes)
    vocab_size: int = 256
    # Encoders from the outside in, the innermost stack, decoders from the inside out: 2 s + 1 layouts (`stack`).
    layout: tuple[str, ...] = ("m4", "T22", "m4")
    d_model: tuple[int, ...] = (1024, 1536)
    d_intermediate: tuple[int, ...] = (0, 4096)
    n_heads: tuple[int, ...] = (16, 16)
    # Channels of each head that RoPE turns.
    rotary_dim: tuple[int, ...] = (32, 48)
    # Positions before its own that a query sees; -1 = all.
    window: tuple[int, ...] = (1023, -1)
    chunking: tuple[Chunking, ...] = ()
    ssm: Mamba2Config = dataclasses.field(default_factory=Mamba2Config)
    # Lengths of the n-grams whose hashed embeddings are added to those of the bytes (BLT, Pagnoni et al., 2024,
    # section 3.2.1), and the rows of each table.
    ngrams: tuple[int, ...] = ()
    ngram_rows: int = 16384
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    # A bias on the logits.
    head_bias: bool = False
    # RMSNorm on queries and keys, head by head (as Qwen 3 has it; the released H-Nets don't).
    qk_norm: bool = False
    # Standard deviation of initial matrices.
    init_std: float = 0.02
    max_length: int = 65536
    bos_id: int | None = 254
    eos_ids: tuple[int, ...] = (255,)
    pad_id: int | None = None
    # Compute dtype; routers, residual streams, SSM states, softmax and logits are float32 in any case.
    dtype: str = "float32"
    # Recompute each layer in the backward pass instead of storing its activations.
    remat: bool = False
    # What layers t and T whose queries see all keep: a policy of `kvcache.policies`, or None for everything. Where it
    # names layers by their number, t and T are counted, in the order in which they are computed.
    memory: Any = None
    # Parity with the released code: unused chunk slots hold other positions, and ratio losses average over padding.
    official_padding: bool = False

    def __post_init__(self):
        config.check(
            self, vocab_size=(1, 2**28), d_model=(1, 2**20), d_intermediate=(0, 2**24), n_heads=(1, 2**16),
            rotary_dim=(0, 2**16), window=(-1, 2**31 - 1), ngrams=(1, 2**16), ngram_rows=(1, 2**28),
            norm_eps=(0, 1), init_std=(0, 1e6), max_length=(1, 2**31 - 1),
            bos_id=(0, 2**28), eos_ids=(0, 2**28), pad_id=(0, 2**28),
        )  # fmt: skip
        stages = (len(self.layout) + 1) // 2
        if len(self.layout) % 2 == 0:
            raise AtomError(f"layout: expected an odd number of stacks, got {len(self.layout)}")
        for name in ("d_model", "d_intermediate", "n_heads", "rotary_dim", "window"):
            if len(getattr(self, name)) != stages:
                raise AtomError(
                    f"{name}: expected {stages} numbers for {len(self.layout)} stacks, got {len(getattr(self, name))}"
                )
        if len(self.chunking) != stages - 1:
            raise AtomError(f"chunking: expected {stages - 1} entries, got {len(self.chunking)}")
        if any(a > b for a, b in zip(self.d_model, self.d_model[1:])):
            raise AtomError(f"d_model: stages must not get narrower, got {self.d_model}")
        if self.dtype not in ("float32", "bfloat16"):
            raise AtomError(f"dtype: expected float32 or bfloat16, got {self.dtype!r}")
        for chunking in self.chunking:
            _check_chunking(chunking)
        for chunking in self.chunking[1:]:
            if option := rules.late(chunking.rule):
                raise AtomError(f"{option} is about the next byte, so it can only cut the outermost stage")
        for c in self.chunking:
            if rules.for_frames(c.rule) and not ports.frames(self):
                raise AtomError(
                    f"rule: {type(c.rule).__name__} is for frames, and the port is {type(self.port).__name__}"
                )
        policies.check(self.memory)
        for s in range(self.stages):
            self._check_layers(s, "".join(self.layouts(s)))

    def _check_layers(self, s: int, layout: str) -> None:
        letters = {letter: stack.MIXERS[letter] for letter, _ in stack.parse(layout)}
        for mixer in letters.values():
            mixer.check(self.width(s), f"stage {s}")
        if any(mixer.mlp for mixer in letters.values()) and self.d_intermediate[s] < 1:
            raise AtomError(f"d_intermediate: stage {s} has layers with an MLP, so it must be above 0")
        if "x" in letters and (self.d_model[s], self.n_heads[s]) != self._relative_size():
            raise AtomError("layout: stages with x layers share their biases, so d_model and n_heads must be equal")

    def _relative_size(self) -> tuple[int, int] | None:
        """Width and heads of the x layers, or None without any."""
        stages = (s for s in range(self.stages) if any("x" in layout for layout in self.layouts(s)))
        return next(((self.d_model[s], self.n_heads[s]) for s in stages), None)

    @property
    def stages(self) -> int:
        """Stages, the innermost included."""
        return len(self.d_model)

    def width(self, s: int) -> Width:
        """Layer sizes of stage s."""
        return Width(
            d=self.d_model[s], f=self.d_intermediate[s], heads=self.n_heads[s], rotary=self.rotary_dim[s],
            window=self.window[s], eps=self.norm_eps, ssm=self.ssm, std=self.init_std, qk_norm=self.qk_norm,
        )  # fmt: skip

    def layouts(self, s: int) -> tuple[str, ...]:
        """(encoder, decoder) of stage s, or (main,) of the innermost one."""
        return (self.layout[s],) if s == self.stages - 1 else (self.layout[s], self.layout[-1 - s])

    def stacks(self, s: int) -> tuple[tuple[Part, ...], ...]:
        """The same taken apart into runs of layers."""
        widths = map(self.width, (*range(self.stages), *reversed(range(self.stages - 1))))
        every = stack.parts(self.layout, widths, self.memory)
        return (every[s],) if s == self.stages - 1 else (every[s], every[-1 - s])


def _check_chunking(c: Chunking) -> None:
    """Refuses parts that do not go together."""
    rule = rules.of(c.rule)
    if rules.looks_ahead(c.rule):
        raise AtomError(f"rule: {type(c.rule).__name__} looks ahead, which needs ids that say where units end")
    pooling.check(rule.KIND, c.pool)
    if c.upsample not in upsampling.UPSAMPLERS:
        raise AtomError(f"upsample: unknown {c.upsample!r}; known: {', '.join(upsampling.UPSAMPLERS)}")
    if c.slots > 1 and (c.pool, c.upsample) != ("attention", "cross_attention"):
        raise AtomError("slots: only pool 'attention' with upsample 'cross_attention' has more than one per chunk")
    if (c.confidence or c.mix == "ema") and not getattr(rule, "HAS_P", False):
        name = "confidence" if c.confidence else "mix"
        raise AtomError(f"{name}: needs probabilities of marks, and {type(c.rule).__name__} has none")


def spec(cfg: HNetConfig) -> Tree:
    """ParamSpec tree: embed, unembed, and per stage encoder, rule, pool, residual, upsample, decoder (or main)."""
    tree = ports.of(cfg).spec(cfg)
    if (size := cfg._relative_size()) is not None:
        tree["relative"] = relative.biases_spec(*size)
    heights = 0
    for s in range(cfg.stages):
        heights += sum(map(stack.height, cfg.layouts(s)))
        tree[f"stage{s}"] = _stage_spec(cfg, s, max(heights, 1) ** -0.5)
    return tree


def _stage_spec(cfg: HNetConfig, s: int, out_scale: float) -> Tree:
    d, width = cfg.d_model[s], cfg.width(s)
    tree = {}
    if s and d > cfg.d_model[s - 1] and cfg.chunking[s - 1].slots == 1:
        tree["lift"] = ParamSpec((d - cfg.d_model[s - 1],), (None,), zeros)
    if s == cfg.stages - 1:
        return tree | {"main": stack.stack_spec(*cfg.stacks(s), width, out_scale)}
    encoder, decoder = cfg.stacks(s)
    chunking = cfg.chunking[s]
    tree |= {
        "encoder": stack.stack_spec(encoder, width, out_scale),
        "decoder": stack.stack_spec(decoder, width, out_scale),
    }
    tree |= {
        "rule": rules.of(chunking.rule).spec(chunking.rule, d),
        "pool": pooling.POOLS[chunking.pool].spec(chunking, d),
        "upsample": upsampling.UPSAMPLERS[chunking.upsample].spec(chunking, d),
    }
    if chunking.residual == "linear":
        tree["residual"] = {"w": ParamSpec((d, d), ("embed", None), zeros), "b": ParamSpec((d,), (None,), zeros)}
    if rules.of(chunking.rule).KIND == END:
        tree["null"] = ParamSpec((d,), (None,), normal(1.0))
    if chunking.norm:
        tree["norm"] = {"w": ParamSpec((d,), (None,), ones), "b": ParamSpec((d,), (None,), zeros)}
    if chunking.slots > 1:
        wide, inner = chunking.slots * d, cfg.d_model[s + 1]
        tree["join"] = ParamSpec((wide, inner), ("embed", None), normal(wide**-0.5))
        tree["part"] = ParamSpec((inner, wide), ("embed", None), normal(inner**-0.5))
    return {k: v for k, v in tree.items() if v != {}}


def roomier(cfg: HNetConfig) -> HNetConfig | None:
    """The same model with room for more chunks, or None where every position has one."""
    if all(c.capacity == 1 for c in cfg.chunking):
        return None
    # Bounded: 0.25, 0.5, 1 and the like, so few programs are ever compiled.
    wider = tuple(dataclasses.replace(c, capacity=min(1.0, 2 * c.capacity)) for c in cfg.chunking)
    return dataclasses.replace(cfg, chunking=wider)


def chunking(target: float = 6.0, capacity: float = 0.25, **changes: Any) -> Chunking:
    """H-Net's own way to find, pool, smooth and spread its units."""
    return Chunking(rule=Cosine(target=target), pool="first", mix="ema", upsample="repeat", residual="linear",
                    confidence=True, capacity=capacity, **changes)  # fmt: skip


def lr_factors(d_model: tuple[int, ...], targets: tuple[float, ...]) -> tuple[float, ...]:
    """Learning-rate factor of every stage, outermost first, from the bytes per unit that its chunking aims at:
    sqrt(4.6 * (product of the targets from stage s on / product of all) * (innermost width / width of s)).

    The rule is H-Net's (Hwang et al., 2025, section 2.3.2, as cited by others; 4.6 is recalled, not verified).
    """
    targets = (*targets, 1.0)
    total = math.prod(targets)
    return tuple(math.sqrt(4.6 * math.prod(targets[s:]) / total * d_model[-1] / d) for s, d in enumerate(d_model))
