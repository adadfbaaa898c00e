"""World models: what comes next in a world, what it brings, and when it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from atom_jax import checkpoint, config
from atom_jax.chunking.rules import surprise
from atom_jax.chunking.rules.surprise import Surprise
from atom_jax.data import envs, numbered
from atom_jax.data.config import DataConfig
from atom_jax.data.pipeline import row_numbers
from atom_jax.models import registry, world
from atom_jax.models.hnet import ports
from atom_jax.models.world import WorldConfig
from atom_jax.models.world.config import END, NOTHING, REWARD
from atom_jax.params import Tree, flatten
from atom_jax.training.losses import Sums
from atom_jax.training.objectives.base import Objective, Rows, Setting, check_frozen, register
from atom_jax.training.plots import Pages
from atom_jax.typing import FRAMES, AtomError, Frames


@struct.dataclass
class Numbers:
    """Which episodes a batch holds: number, stream i32 [b] (`data.numbered`); loss_mask bool [b, t]."""

    number: jax.Array
    stream: jax.Array
    loss_mask: jax.Array


@register
@dataclasses.dataclass(frozen=True)
class Foresee(Objective):
    """The next frame in nats, and, each with its factor: `local`, the same foretold by the encoder alone; `outcome`,
    the cross-entropy of what a step brings, in which rare kinds weigh as much as the most frequent one, but no more
    than `rarest` times what they are (squared and cross-entropy errors of scalar rewards and of ends, as they are);
    `secret`, the cross-entropy of what the world hides, from the units alone, from where on it stays as it is.

    Episodes are made in the step, from their numbers (data.sources: "env:watch"). Units should stand still while the
    main network learns, so a run in two stages comes first with `only_local`, which learns nothing but the local
    prediction; then the encoder, the port's inlet and local are frozen (optim.groups).
    """

    only_local: bool = False
    local: float = 0.5
    outcome: float = 3.0
    rarest: float = 40.0
    secret: float = 1.0

    name: ClassVar[str] = "foresee"
    reads: ClassVar[str] = FRAMES
    pages: ClassVar[Pages] = {
        "foresee": {
            "nats per frame": {"frame": "all layers", "local": "local"},
            "right": {"outcome_right": "rewards and ends", "secret_right": "what is hidden"},
            "units": {"frames_per_unit_0": "frames per unit", "units_at_events": "share at events"},
        }
    }

    def __post_init__(self):
        factor = (0, 1e6)
        config.check(self, local=factor, outcome=factor, rarest=(1, 1e6), secret=factor)

    def check(self, exp: Any) -> None:
        """The model must be one of the world that the data are of, and its parts must be there, and stay so."""
        if not isinstance(exp.model, WorldConfig):
            raise AtomError(f"foresee: model must be a WorldConfig, not a {type(exp.model).__name__}")
        env, cfg = envs.parse(numbered.world_of(exp.data)), exp.model
        made, port = (env.shape, env.classes, env.actions), cfg.port
        if made != (port.grid, port.classes, port.actions):
            raise AtomError(f"model.port: {env.name} has a grid {made[0]}, {made[1]} classes and {made[2]} actions")
        if cfg.secrets not in (0, env.secrets):
            raise AtomError(f"model.secrets is {cfg.secrets}: {env.name} hides one of {env.secrets}")
        for name in registry.kind(cfg).parts(cfg):
            if not exp.init_from and exp.first is None:
                raise AtomError(f"foresee: the model's {name} is trained before it: init_from should be a run of it")
            check_frozen(exp, self.name, (f"{name}/{path}" for path in flatten(world.spec(cfg)[name])))

    def begin(self, setting: Setting, params: Any, places: Tree, data: Iterator[Rows]) -> tuple[Any, list[str]]:
        """Sets the threshold of a surprise rule with a `target`, once the local prediction is there: where
        `init_from` is a world model, and not a part of one."""
        exp, cfg = setting.exp, setting.exp.model
        rule = cfg.chunking[0].rule
        if self.only_local or not (isinstance(rule, Surprise) and rule.target):
            return params, []
        if params is None or not isinstance(checkpoint.load_config(exp.init_from, exp.adapter)[0], WorldConfig):
            said = f"no local prediction is there to find {rule.target:g} frames per unit with"
            return params, [f"{said}: a unit starts above {rule.tau:g} nats"]
        # The same episodes in every process, and none that training then skips.
        found = exp.data
        batch = self.batch(next(numbered.NumberedRows(found, range(found.batch_size))))
        find = jax.jit(
            lambda p, batch: surprise.calibrated(_local_nats(p, _read(p, batch, setting)[0], cfg).ravel(), rule)
        )
        tau = find(params, batch)
        stage = params["stage0"]
        rule_p = stage["rule"] | {"tau": jax.device_put(tau, places["stage0"]["rule"]["tau"])}
        params = params | {"stage0": stage | {"rule": rule_p}}
        return params, [f"a unit starts above {float(tau):.3g} nats, for {rule.target:g} frames per unit"]

    def rows(self, setting: Setting, cfg: DataConfig, index: int, count: int) -> numbered.NumberedRows:
        """Numbers of episodes."""
        return numbered.NumberedRows(cfg, row_numbers(cfg, index, count))

    def described(self, setting: Setting) -> Rows:
        """See Objective."""
        return numbered.described(setting.exp.data, setting.exp.data.batch_size)

    def batch(self, rows: Rows) -> Numbers:
        """Which episodes."""
        return Numbers(rows["number"], rows["stream"], rows["loss_mask"])

    def counts(self, batch: Numbers, setting: Setting) -> jax.Array | None:
        """f32 [3]: steps that bring nothing, a reward, and an end without one; None of a batch that is one part."""
        return None if setting.exp.optim.accumulate == 1 else _counted(_made(batch, setting)[0], batch.loss_mask)

    def loss(
        self, params: Any, batch: Numbers, key: jax.Array | None, step: Any, *, setting: Setting, counts: Any = None
    ) -> Sums:
        """learned: frame and local (nats per frame), outcome_right (of rewards and ends), secret_right, and what the
        model says about its units."""
        cfg, mask = setting.exp.model, batch.loss_mask.astype(jnp.float32)
        frames, secret, since = _read(params, batch, setting)
        targets, ahead = jnp.sum(mask), mask[:, :-1]
        pair = lambda x: jnp.stack([x, targets])  # noqa: E731
        if self.only_local:
            nats = jnp.sum(_local_nats(params, frames, cfg) * ahead)
            return Sums(nats, nats, targets.astype(jnp.int32), None, {"local": pair(nats)})
        x_bte, _, aux = world.hidden(params, frames, cfg=cfg, key=key)
        found, port = world.outputs(params, x_bte, cfg=cfg), ports.of(cfg)
        nats, local = (
            jnp.sum(port.nll(x[:, :-1], frames.obs[:, 1:], cfg) * ahead) for x in (found.frame, found.local)
        )
        whole = _counted(frames, mask) if counts is None else counts
        weight = jnp.minimum(jnp.max(whole) / jnp.maximum(whole, 1.0), self.rarest)
        outcome, right = _outcome(found, frames, mask, weight)
        loss = nats + self.local * local + self.outcome * outcome + aux["loss"] * targets
        learned = {"frame": pair(nats), "local": pair(local), "outcome_right": right}
        if cfg.secrets:
            known = mask * (frames.positions >= since[:, None])
            said = jnp.take_along_axis(jax.nn.log_softmax(found.secret), secret[:, None, None], axis=-1)[..., 0]
            loss -= self.secret * jnp.sum(said * known)
            hits = jnp.sum((jnp.argmax(found.secret, -1) == secret[:, None]) * known)
            learned["secret_right"] = jnp.stack([hits, jnp.sum(known)])
        more = {name.replace("bytes_per_unit", "frames_per_unit"): x for name, x in aux["metrics"].items()}
        return Sums(loss, nats, targets.astype(jnp.int32), None, learned | more)


def _made(batch: Numbers, setting: Setting) -> tuple[Frames, jax.Array, jax.Array]:
    """The episodes of a batch; i32 [b] each: what each hides (0 where nothing is hidden yet), and the frame from
    which on that stays as it is."""
    env, frames = envs.parse(numbered.world_of(setting.exp.data)), batch.loss_mask.shape[1]

    def one(stream: jax.Array, number: jax.Array) -> Any:
        key = jax.random.fold_in(jax.random.key(stream), number)
        found, last = jax.tree.map(lambda x: x[0], envs.episodes(env, key, 1, frames))
        secret, since = env.secret(last)
        return found, jnp.maximum(secret, 0), since

    return jax.vmap(one)(batch.stream, batch.number)


def _read(params: Any, batch: Numbers, setting: Setting) -> tuple[Frames, jax.Array, jax.Array]:
    """The same with frames as the model reads them."""
    frames, secret, since = _made(batch, setting)
    cfg = setting.exp.model
    return frames.replace(obs=ports.of(cfg).encode(params, frames.obs, cfg)), secret, since


def _local_nats(params: Any, frames: Frames, cfg: WorldConfig) -> jax.Array:
    """Nats f32 [b, t - 1] that every frame but the first takes to foretell locally."""
    prediction = world.local(params, frames, cfg=cfg)
    return ports.of(cfg).nll(prediction[:, :-1], frames.obs[:, 1:], cfg)


def _kinds(frames: Frames) -> jax.Array:
    """f32 [b, t, 3]: one of `world.config.NOTHING`, REWARD and END, what each step brings."""
    return jax.nn.one_hot(jnp.where(frames.reward > 0, REWARD, jnp.where(frames.done, END, NOTHING)), 3)


def _counted(frames: Frames, mask_bt: jax.Array) -> jax.Array:
    """How many steps there are of each kind, f32 [3]."""
    return jnp.sum(_kinds(frames) * mask_bt[:, :, None], axis=(0, 1))


def _outcome(
    found: world.Foresight, frames: Frames, mask_bt: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The loss f32 [] of what steps bring, summed over frames, with the weights f32 [3] of its kinds; and of the
    steps that bring something, how many are foretold, f32 [2] with their number."""
    kinds = _kinds(frames)
    rare = mask_bt * (1 - kinds[..., NOTHING])
    if found.outcome.shape[-1] == 2:
        value, logit = found.outcome[..., 0], found.outcome[..., 1]
        end = frames.done.astype(jnp.float32)
        loss = jnp.square(value - frames.reward) + jax.nn.softplus(logit) - end * logit
        right = (logit > 0) & frames.done
    else:
        loss = -jnp.sum(kinds * jax.nn.log_softmax(found.outcome) * weight[None, None], axis=-1)
        right = jnp.argmax(found.outcome, -1) == jnp.argmax(kinds, -1)
    return jnp.sum(loss * mask_bt), jnp.stack([jnp.sum(right * rare), jnp.sum(rare)])
