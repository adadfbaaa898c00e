"""What goes in and comes out at the outermost positions of a model with learned units.

A port is a registered configuration class and a module, or anything else that has what a module here has; `cfg` is
the `HNetConfig` whose `port` it is:
`spec(cfg)` describes its parameters, which stand beside those of the stages;
`empty(cfg, b)` is what it keeps of b rows before their first position;
`inlet(p, batch, tokens, before, cfg)` makes vectors [b, t, d] of what a batch holds, and gives what it keeps then
(None where `before` is), and the share f32 [b, t] of each position that differs from the one before, or None where
that means nothing;
`outlet(p, x_btd, cfg)` makes predictions float32 of final states;
`metrics(mark_bt, batch, kind)` says where units begin or end: name -> f32 [2], a sum and what to divide it by;
`operations(cfg)`, `describe(cfg)`: operations per position, and what goes in and out in words.

FRAMES = True: batches are `typing.Frames`. Such a port also has
`encode(p, obs, cfg)` and `decode(p, read, cfg)`: frames [b, t, ...] of the world as the model reads them, in batches
and in all functions here but `right`, and back;
`outlet_spec(cfg, d, std)` and `read(p, x_btd, cfg)`: an outlet for states of another width, with its own parameters;
`nll(prediction, obs, cfg)`: nats f32 [b, t] of frames; `sample(prediction, key, cfg)`: frames, the likeliest ones
without a key; `right(found, obs, cfg)`: bool [b, t], frames that count as the same; and its configuration has `grid`,
`classes` (0: numbers in [0, 1]) and `actions`, as `data.envs.Environment` has them (shape, classes, actions).
It may have `parts(cfg)`: models within it that are trained before and stay as they are, as of `models.family.Kind`.
`vectors.py` has what such ports share.
"""

from __future__ import annotations

from typing import Any

from atom_jax.models.hnet.ports import cells, codes, ids, pixels
from atom_jax.models.hnet.ports.cells import Cells
from atom_jax.models.hnet.ports.codes import Codes
from atom_jax.models.hnet.ports.ids import Bytes
from atom_jax.models.hnet.ports.pixels import Pixels
from atom_jax.typing import AtomError

__all__ = ["PORTS", "Bytes", "Cells", "Codes", "Pixels", "frames", "of", "parts", "register"]

# From the class of a configuration to the port.
PORTS: dict[type, Any] = {Bytes: ids, Cells: cells, Pixels: pixels, Codes: codes}


def register(cfg: type, port: Any) -> None:
    """Makes a port of one's own known under its (registered) configuration class."""
    PORTS[cfg] = port


def of(cfg: Any) -> Any:
    """The port of an `HNetConfig`. Raises AtomError where it has none that is known."""
    if type(cfg.port) not in PORTS:
        raise AtomError(f"port: expected one of {', '.join(c.__name__ for c in PORTS)}, got {cfg.port!r}")
    return PORTS[type(cfg.port)]


def frames(cfg: Any) -> bool:
    """Whether an `HNetConfig` reads `typing.Frames`."""
    return getattr(of(cfg), "FRAMES", False)


def parts(cfg: Any) -> dict[str, Any]:
    """Models within the port of an `HNetConfig`, by the name of their parameters."""
    found = getattr(of(cfg), "parts", None)
    return {} if found is None else found(cfg)
