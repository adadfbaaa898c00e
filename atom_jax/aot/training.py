"""What a training step needs on chips that nobody has to have: it is compiled as for a run, and not executed."""

from __future__ import annotations

import dataclasses
import math

import jax

from atom_jax import params as params_lib
from atom_jax.aot.report import Chips, Report
from atom_jax.aot.topology import Compiled, per_chip
from atom_jax.models.transformer import TransformerConfig
from atom_jax.training.config import Experiment
from atom_jax.training.program import Program


@dataclasses.dataclass(frozen=True)
class StepReport(Report):
    """Sizes in GiB per chip; operations of the whole step, on all chips.

    parameters: as they are trained. moments: of the optimiser, with a moving average of parameters. needed:
    operations of forward and backward passes. executed: those, and what is computed again to save memory.
    """

    exp: Experiment
    mesh: dict[str, int]
    moments: float
    needed: float
    executed: float

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.mesh.values())

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.exp.data.batch_size * self.exp.data.seq_len

    @property
    def step(self) -> Compiled:
        """The compiled step."""
        return self.programs["step"]

    @property
    def total(self) -> float:
        """All that the step needs."""
        return self.step.total

    @property
    def free(self) -> float | None:
        """Share of the chip's memory that stays free; None for chips of unknown size."""
        return None if self.chip is None else 1 - self.total / self.chip.memory

    def sizes(self) -> list[str]:
        """Lines about what the step needs, computes and sends."""
        lines = [f"optimiser state  {self.moments:9.3f} GiB per chip"]
        if self.step.temporary is not None:
            # The batch above all, and what layouts pad.
            other = max(self.step.arguments - self.parameters - self.moments, 0.0) + self.step.new
            lines += [
                f"batch and other  {other:9.3f} GiB per chip",
                f"temporaries      {self.step.temporary:9.3f} GiB per chip",
            ]
        rate = "" if self.chip is None else f"; {self.executed / self.chips / self.chip.rate:.3g} s at the peak rate"
        lines += [
            f"total            {self.step.verdict(self.chip)}",
            f"operations       {self.needed:.4g} per step, {self.needed / self.tokens:.4g} per token; "
            f"with what is computed again {self.executed:.4g} per step{rate}",
        ]
        if self.step.traffic is not None:
            lines += [f"sent             {self.step.traffic}"]
        return lines

    def advice(self) -> str:
        """What to change where the step does not fit, as a clause with the settings."""
        exp, mesh = self.exp, self.mesh
        times = 2 ** math.ceil(math.log2(max(self.total / (0.9 * self.chip.memory), 1.01)))
        if self.parameters + self.moments > self.chip.memory / 2:
            return (
                f"parameters and optimiser take most of it: spread them over {times} times as many chips "
                f"(--set mesh.fsdp={mesh['fsdp'] * times}, or more on the axis tensor)"
            )
        rows = exp.data.batch_size // (mesh["data"] * mesh["fsdp"] * exp.optim.accumulate)
        if not exp.model.remat:
            change = "--set model.remat=true"
        elif rows > 1:
            change = f"--set optim.accumulate={exp.optim.accumulate * min(times, rows)}"
        elif isinstance(exp.model, TransformerConfig):
            change = f"spread rows over chips, --set mesh.context={mesh['context'] * times}"
        else:
            change = f"a shorter data.seq_len, or --set mesh.tensor={mesh['tensor'] * times}"
        return f"activations take most of it: {change}"


def check(exp: Experiment, topology: str | None) -> StepReport:
    """Compiles the step of a run for a topology (see `topology.devices`); no array is made.

    Raises AtomError when there is no such topology, for a configuration that does not fit it, and when the step does
    not compile for other reasons than its size.
    """
    chips = Chips(topology, exp.mesh)
    with jax.set_mesh(chips.mesh):
        program = Program(exp, chips.mesh, _Tokenizer(exp.model.vocab_size))
        chips.compile("step", program.step.lower(program.state, program.abstract_batch()))
    needed, again = program.operations()
    state, what = program.state, f"{exp.data.batch_size} rows of {exp.data.seq_len:,} tokens"
    return chips.report(
        params_lib.count(program.spec), per_chip(state.params), what, StepReport, exp=exp,
        mesh=dict(chips.mesh.shape), moments=per_chip((state.opt, state.ema)), needed=needed, executed=needed + again,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Tokenizer:
    """Of a tokenizer, a step holds the bytes per token only: any numbers, so that none is fetched or trained."""

    vocab_size: int
    bos_id: int | None = None
    pad_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    front: tuple[int, ...] = ()
    document_id: int = 0

    @property
    def subwords(self) -> _Tokenizer:
        return self

    @property
    def pieces(self) -> dict[int, bytes]:
        return {0: b" "}

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"x" * (1 + ids[0] % 7)
