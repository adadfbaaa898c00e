"""The three tiny H-Nets whose weights, outputs and gradients the official code made (tests/golden/hnet)."""

import dataclasses
import json
import pathlib

import numpy as np
from safetensors.numpy import load_file

from atom_jax.checkpoint import families
from atom_jax.checkpoint.tensors import TensorInfo
from atom_jax.models.hnet import HNetConfig, published
from atom_jax.typing import Batch

NAMES = ("t_1stage", "m_1stage", "mt_2stage")
DIRECTORY = pathlib.Path(__file__).resolve().parent.parent / "golden" / "hnet"


class Weights:
    """The weights under their published names, as `families.load` reads them."""

    def __init__(self, numbers):
        self.label = "golden H-Net"
        self.arrays = {k[2:]: v for k, v in numbers.items() if k.startswith("w.")}
        self.infos = {k: TensorInfo(v.shape, v.dtype) for k, v in self.arrays.items()}

    def read(self, name):
        return self.arrays[name]


class Case:
    """One of them: numbers, config (with room for every chunk), params, and its three rows as a batch."""

    def __init__(self, name: str):
        self.numbers = load_file(DIRECTORY / f"{name}.safetensors")
        entry = json.loads((DIRECTORY / "configs.json").read_text())[name]
        self.published, targets = entry["config"], entry["targets"]
        cfg = published.from_hf(self.published, name)
        self.cfg = with_chunking(cfg, capacity=1.0, target=targets)
        self.params = families.load(Weights(self.numbers), self.cfg)
        self.ids, self.mask = self.numbers["input_ids"].astype(np.int32), self.numbers["mask"]
        self.lengths = self.mask.sum(1)
        positions = np.broadcast_to(np.arange(self.ids.shape[1], dtype=np.int32), self.ids.shape)
        self.batch = Batch(self.ids, positions, self.mask.astype(np.int32))

    def official(self) -> HNetConfig:
        """With the chunk slots of the official code, which has as many as the fullest row needs, and its padding."""
        marks = [self.numbers[f"stage{s}.boundary_mask"] for s in range(self.cfg.stages - 1)]
        cfg = with_chunking(self.cfg, capacity=[m.sum(1).max() / m.shape[1] for m in marks], official_padding=True)
        return dataclasses.replace(cfg, official_padding=True)


def with_chunking(cfg: HNetConfig, capacity=None, **rule) -> HNetConfig:
    """cfg with other capacities and fields of its rules: one value for all stages, or a list."""

    def pick(value, s):
        return float(value[s]) if isinstance(value, list) else value

    stages = []
    for s, c in enumerate(cfg.chunking):
        new = dataclasses.replace(c.rule, **{k: pick(v, s) for k, v in rule.items()})
        stages.append(dataclasses.replace(c, capacity=pick(capacity, s), rule=new))
    return dataclasses.replace(cfg, chunking=tuple(stages))
