"""What the machine is, and what a model's work asks of it: arithmetic and bytes, counted from its configuration."""

from __future__ import annotations

import os
import pathlib
import platform
from typing import Any

from benchmarks.worker import cores

Config = dict[str, Any]
FLOAT = 4  # bytes of a float32


def describe() -> dict[str, Any]:
    """The processor's name, usable cores, memory in bytes (0: unknown) and the load before the benchmark began."""
    name, memory = platform.processor() or platform.machine(), 0
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"processor": name, "cores": cores(), "memory": memory, "load": os.getloadavg()[0]}


def forward_flops(cfg: Config, rows: int, length: int, logits: int) -> float:
    """Multiplications and additions of a forward pass over `rows` sequences of `length` tokens, with logits at
    `logits` positions of each. Matrix products only; attention counts the pairs that causality lets see."""
    heads = cfg["n_heads"] * cfg["head_dim"]
    per_token = 2 * sum(_layer_weights(cfg)) * cfg["n_layers"]
    attention = sum(4 * heads * _pairs(length, window) for window in _windows(cfg))
    return float(rows * (length * per_token + attention + 2 * logits * cfg["d_model"] * cfg["vocab_size"]))


def train_flops(cfg: Config, rows: int, length: int) -> float:
    """Of one training step: forward, and twice as much backward. Recomputation is not counted."""
    return 3 * forward_flops(cfg, rows, length, length)


def decode_bytes(cfg: Config, rows: int, held: float) -> float:
    """Bytes to read for one more token in each of `rows` sequences that hold `held` tokens: weights once, caches."""
    entry = 2 * cfg["n_kv_heads"] * cfg["head_dim"]
    cache = sum(rows * entry * min(held, window) for window in _windows(cfg))
    head = cfg["d_model"] * cfg["vocab_size"]
    return FLOAT * (sum(_layer_weights(cfg)) * cfg["n_layers"] + head + cache)


def weight_bytes(cfg: Config) -> float:
    """Bytes of the matrices of a model in float32."""
    tables = cfg["d_model"] * cfg["vocab_size"] * (1 if cfg["tie_embeddings"] else 2)
    return FLOAT * (sum(_layer_weights(cfg)) * cfg["n_layers"] + tables)


def _layer_weights(cfg: Config) -> tuple[int, int]:
    """Matrix elements of attention and MLP of one layer."""
    d, k = cfg["d_model"], cfg["head_dim"]
    return 2 * d * k * (cfg["n_heads"] + cfg["n_kv_heads"]), 3 * d * cfg["d_ff"]


def _windows(cfg: Config) -> list[float]:
    """Tokens that a query of each layer sees at most."""
    kinds = cfg["layer_types"] or ["full"] * cfg["n_layers"]
    return [cfg["sliding_window"] if kind == "sliding" else float("inf") for kind in kinds]


def _pairs(length: int, window: float) -> float:
    """Pairs of a query and a key that it sees."""
    full = min(length, window)
    return full * (full + 1) / 2 + (length - full) * full
