"""Our side of the benchmark: a process that loads, generates and trains with AToM-JAX when told to."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import atom_jax
from atom_jax import config, sharding
from atom_jax.data.builtin import austen
from atom_jax.inference.generate import generate
from atom_jax.training import start
from atom_jax.training.program import Program
from atom_jax.typing import LM, AtomError
from benchmarks.worker import peak_bytes, serve

# Batches of tokens that training goes through again and again.
BATCHES = 8
Rows = list[list[int]]


class Ours:
    """Every public method is one call over the pipe: plain values in, plain values out; times in seconds."""

    peak = staticmethod(peak_bytes)

    def about(self) -> dict[str, str]:
        """Versions."""
        return {"jax": jax.__version__, "backend": jax.default_backend()}

    def matmul(self, n: int) -> float:
        """Seconds of one float32 product of two [n, n] matrices."""
        x = jnp.ones((n, n), jnp.float32)
        return _timed(jax.jit(jnp.matmul), x, x)

    def read(self, nbytes: int) -> float:
        """Seconds of one pass over so many bytes."""
        x_rc = jnp.ones((nbytes // 4 // 4096, 4096), jnp.float32)
        return _timed(jax.jit(lambda x: x.sum(-1)), x_rc)

    def copy(self, nbytes: int) -> float:
        """Seconds of reading so many bytes and writing as many to memory that is already there."""
        x, y = jnp.ones(nbytes // 4, jnp.float32), jnp.zeros(nbytes // 4, jnp.float32)
        negate = jax.jit(lambda y, x: -x, donate_argnums=0, keep_unused=True)
        y = jax.block_until_ready(negate(y, x))
        began = time.perf_counter()
        jax.block_until_ready(negate(y, x))
        return time.perf_counter() - began

    def open(self, checkpoint: str) -> dict[str, Any]:
        """Loads a model to compute in float32; returns its configuration."""
        self.lm = atom_jax.load(checkpoint, dtype="float32")
        # Both sides generate ids: text would be work that the peer does not do.
        self.ids_only = dataclasses.replace(self.lm, tokenizer=None)
        return config.to_json(self.lm.config)

    def prompts(self, rows: int, length: int) -> Rows:
        """Different stretches of a novel in the model's tokens (random tokens where it has no tokenizer)."""
        tokenizer, need = self.lm.tokenizer, rows * length
        if tokenizer is None:
            ids = np.random.default_rng(0).integers(0, self.lm.config.vocab_size, need)
        else:
            # At most 8 bytes of prose per token.
            ids = np.asarray(tokenizer.encode(_novel()[: 8 * need]))[:need]
        return ids.reshape(rows, length).tolist()

    def logits(self, row: list[int], file: str) -> None:
        """Writes the logits [t, v] of every position."""
        np.save(file, np.asarray(atom_jax.apply(self.lm, [row]).logits[0]))

    def prefill(self, rows: Rows) -> dict[str, Any]:
        """Reads the prompts and chooses one token."""
        out = generate(self.ids_only, rows, max_new_tokens=1, stop_ids=())
        return {"seconds": out.stats["prefill_seconds"], "ids": out.ids}

    def decode(self, rows: Rows, new: int) -> dict[str, Any]:
        """Greedy tokens, new + 1 per row; seconds of the last `new`."""
        out = generate(self.ids_only, rows, max_new_tokens=new + 1, stop_ids=())
        return {"seconds": out.stats["seconds"] - out.stats["prefill_seconds"], "ids": out.ids}

    def start_training(self, reference: str, directory: str) -> dict[str, Any]:
        """Prepares to train the model of a configuration file from random values, at a constant learning rate.

        Leaves in `directory`, for the peer, the first model and batches.npy i32 [n, b, t + 1].
        """
        exp = start.configure(
            reference,
            ["optim.optimizer=adamw", "optim.schedule=constant", "optim.warmup_steps=0", "optim.learning_rate=1e-3"],
        )
        rows, length = exp.data.batch_size, exp.data.seq_len
        tokenizer = start.tokenizer(exp)
        ids = np.asarray(tokenizer.encode(_novel()[: 8 * BATCHES * rows * (length + 1)]), np.int32)
        self.batches = np.resize(ids, (BATCHES, rows, length + 1))
        np.save(pathlib.Path(directory) / "batches.npy", self.batches)
        self.mesh = sharding.make_mesh(exp.mesh, jax.devices()[:1])
        with jax.set_mesh(self.mesh):
            self.program = Program(exp, self.mesh, tokenizer)
            self.state, self.trained = self.program.initial(), 0
        atom_jax.save_hf(LM(exp.model, self.state.params, None), directory)
        return {
            "model": config.to_json(exp.model),
            "optim": config.to_json(exp.optim),
            "rows": rows,
            "length": length,
        }

    def train(self, steps: int) -> dict[str, Any]:
        """Takes steps; returns their seconds and losses."""
        losses = []
        began = time.perf_counter()
        with jax.set_mesh(self.mesh):
            for _ in range(steps):
                batch = self.program.put(_batch(self.batches[self.trained % BATCHES]))
                self.state, metrics = self.program.step(self.state, batch)
                self.trained += 1
                losses.append(metrics["loss"])
            jax.block_until_ready(self.state)
        return {"seconds": time.perf_counter() - began, "losses": [float(x) for x in losses]}


def _timed(f: Callable, *args: jax.Array) -> float:
    jax.block_until_ready(f(*args))
    began = time.perf_counter()
    jax.block_until_ready(f(*args))
    return time.perf_counter() - began


def _batch(ids: np.ndarray) -> dict[str, np.ndarray]:
    inputs, ones = np.ascontiguousarray(ids[:, :-1]), np.ones_like(ids[:, 1:])
    return {
        "ids": inputs,
        "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
        "segments": ones,
        "targets": np.ascontiguousarray(ids[:, 1:]),
        "loss_mask": ones > 0,
    }


def _novel() -> str:
    corpus = austen("train")
    return b"".join(corpus.read(i) for i in range(len(corpus))).decode("utf-8")


if __name__ == "__main__":
    serve(Ours(), (AtomError, OSError))
