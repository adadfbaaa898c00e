"""The peer's side of the benchmark: PyTorch and transformers on the CPU, eager, in their fastest setting."""

from __future__ import annotations

import itertools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from benchmarks.worker import cores, peak_bytes, serve

Rows = list[list[int]]
ATTENTION = ("sdpa", "eager")


class Torch:
    """Every public method is one call over the pipe: plain values in, plain values out; times in seconds."""

    peak = staticmethod(peak_bytes)

    def __init__(self):
        self.model: Any = None
        # Torch may start with fewer threads than there are processors, where two of them share one core.
        self.threads = sorted({cores(), torch.get_num_threads()})
        torch.set_num_threads(cores())

    def about(self) -> dict[str, str]:
        """Versions."""
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def settings(self, kind: str) -> list[dict[str, Any]]:
        """The settings to choose from for "machine", "prefill", "decode" or "train"."""
        choices = {"threads": self.threads}
        if kind != "machine":
            choices["attention"] = ATTENTION
        if kind == "decode":
            choices["cache"] = ("dynamic", "static")
        if kind == "train":
            choices["adamw"] = ("fused", "foreach")
        return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]

    def use(self, setting: dict[str, Any]) -> None:
        """Changes to one of `settings`."""
        torch.set_num_threads(setting["threads"])
        if "attention" in setting:
            self.model.set_attn_implementation(setting["attention"])
        self.cache = setting.get("cache")
        if "adamw" in setting:
            self.adamw = self._adamw(setting["adamw"])

    @torch.inference_mode()
    def matmul(self, n: int) -> float:
        """Seconds of one float32 product of two [n, n] matrices."""
        x, out = torch.ones(n, n), torch.empty(n, n)
        return _timed(lambda: torch.mm(x, x, out=out))

    @torch.inference_mode()
    def read(self, nbytes: int) -> float:
        """Seconds of one pass over so many bytes."""
        x_rc = torch.ones(nbytes // 4 // 4096, 4096)
        return _timed(lambda: x_rc.sum(-1))

    @torch.inference_mode()
    def copy(self, nbytes: int) -> float:
        """Seconds of reading so many bytes and writing as many to memory that is already there."""
        x, out = torch.ones(nbytes // 4), torch.zeros(nbytes // 4)
        return _timed(lambda: torch.neg(x, out=out))

    def open(self, checkpoint: str) -> None:
        """Loads a model to compute in float32."""
        self.model = _load(checkpoint).eval()
        # Both sides generate the same number of tokens.
        self.model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def difference(self, row: list[int], file: str) -> dict[str, float]:
        """The largest difference between our logits in `file` and those of this side, and their largest value."""
        logits_tv = self.model(torch.tensor([row])).logits[0].numpy()
        return {"difference": float(abs(logits_tv - np.load(file)).max()), "largest": float(abs(logits_tv).max())}

    @torch.inference_mode()
    def margin(self, row: list[int], a: int, b: int) -> float:
        """How far apart the logits of two tokens are after `row`."""
        logits_v = self.model(torch.tensor([row]), logits_to_keep=1).logits[0, -1]
        return float(abs(logits_v[a] - logits_v[b]))

    @torch.inference_mode()
    def prefill(self, rows: Rows) -> dict[str, Any]:
        """Reads the prompts into a cache and chooses one token."""
        ids = torch.tensor(rows)
        began = time.perf_counter()
        logits_b1v = self.model(ids, use_cache=True, logits_to_keep=1).logits
        chosen = logits_b1v[:, -1:].argmax(-1).tolist()
        return {"seconds": time.perf_counter() - began, "ids": chosen}

    @torch.inference_mode()
    def decode(self, rows: Rows, new: int) -> dict[str, Any]:
        """Greedy tokens, new + 1 per row; seconds of the last `new`."""
        ids, clock = torch.tensor(rows), _Clock()
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new + 1,
            do_sample=False,
            cache_implementation=self.cache,
            disable_compile=True,
            streamer=clock,
        )
        # The prompt comes first, then one call for every token.
        return {"seconds": clock.times[-1] - clock.times[1], "ids": out[:, ids.shape[1] :].tolist()}

    def start_training(self, directory: str, optim: dict[str, Any]) -> None:
        """Prepares to train the model that our side left in `directory` on its batches, with the same optimiser."""
        if optim["optimizer"] != "adamw" or optim["z_loss"] or optim["ema"] or optim["groups"]:
            raise ValueError("the training comparison knows AdamW without z_loss, ema and groups only")
        self.optim, self.trained = optim, 0
        self.batches = torch.from_numpy(np.load(pathlib.Path(directory) / "batches.npy")).long()
        self.model = _load(directory).train()
        self.use(self.settings("train")[0])

    def train(self, steps: int) -> dict[str, Any]:
        """Takes steps; returns their seconds and losses."""
        losses = []
        began = time.perf_counter()
        for _ in range(steps):
            ids = self.batches[self.trained % len(self.batches)]
            logits_btv = self.model(ids[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits_btv.flatten(0, 1), ids[:, 1:].flatten())
            self.adamw.zero_grad(set_to_none=True)
            loss.backward()
            if self.optim["clip_norm"]:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optim["clip_norm"])
            self.adamw.step()
            self.trained += 1
            losses.append(loss.detach())
        return {"seconds": time.perf_counter() - began, "losses": [float(x) for x in losses]}

    def _adamw(self, kind: str) -> torch.optim.Optimizer:
        tables = {id(t.weight) for t in (self.model.get_input_embeddings(), self.model.get_output_embeddings())}
        decays, rest = [], []
        for p in self.model.parameters():
            (decays if p.ndim > 1 and id(p) not in tables else rest).append(p)
        cfg = self.optim
        groups = [{"params": decays, "weight_decay": cfg["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, cfg["learning_rate"], (cfg["b1"], cfg["b2"]), cfg["eps"], **{kind: True})


class _Clock(BaseStreamer):
    """When `generate` handed over the prompt and every token."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _load(directory: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)


def _timed(f: Callable[[], Any]) -> float:
    f()
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


if __name__ == "__main__":
    serve(Torch(), (ValueError, OSError))
