"""mergekit's side of `benchmarks.transplant`: rows of a new vocabulary by its own functions.

Runs in an environment of its own (`make install-mergekit`). Tables come and go as .npy files in a directory, all else
as plain values over the pipe.
"""

from __future__ import annotations

import pathlib
import time
from importlib import metadata

import numpy as np
import torch
import transformers
from mergekit.tokenizer.normalization import normalize_token, unnormalize_token
from mergekit.tokensurgeon.omp import batch_omp
from mergekit.tokensurgeon.subword import SubwordMethod, subword_approximate

from benchmarks.worker import cores, serve

# As mergekit's command has it by default.
BATCH = 512


class Surgeon:
    """Every public method is one call over the pipe: plain values in, plain values out."""

    def about(self) -> dict[str, str]:
        """Versions."""
        return {name: metadata.version(name) for name in ("mergekit", "torch", "transformers")}

    def open(self, directory: str) -> None:
        """Reads tokenizer.json, the source's, and the tables table.npy [v, d], points.npy [s, e], base.npy [s, d] and
        targets.npy [m, e]: shared tokens in the donor and in the source, and new tokens in the donor."""
        torch.set_num_threads(cores())
        self.home = pathlib.Path(directory)
        self.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(self.home / "tokenizer.json"))
        names = ("table", "points", "base", "targets")
        self.tables = {name: torch.from_numpy(np.load(self.home / f"{name}.npy")) for name in names}

    def cuts(self, tokens: list[str], prefix: str) -> list[list[int]]:
        """The source tokens that each of these tokens, spelled as in their vocabulary, is made of. prefix: what a
        space in front is spelled as."""
        texts = [unnormalize_token(token) for token in self._normalised(tokens, prefix)]
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def fvt(self, tokens: list[str], prefix: str) -> float:
        """Writes fvt.npy, the rows of these tokens, and returns the seconds for it."""
        normalised = self._normalised(tokens, prefix)
        begin = time.perf_counter()
        rows = subword_approximate(self.tables["table"], normalised, False, self.tokenizer, SubwordMethod.MEAN)
        seconds = time.perf_counter() - begin
        np.save(self.home / "fvt.npy", rows.numpy())
        return seconds

    def omp(self, k: int) -> float:
        """Writes omp.npy, the rows of all targets, and returns the seconds for it."""
        out, begin = [], time.perf_counter()
        for part in self.tables["targets"].split(BATCH):
            index, weight = batch_omp(part, self.tables["points"], k)
            out.append(torch.bmm(weight.unsqueeze(1), self.tables["base"][index]).squeeze(1))
        rows = torch.cat(out)
        seconds = time.perf_counter() - begin
        np.save(self.home / "omp.npy", rows.numpy())
        return seconds

    def _normalised(self, tokens: list[str], prefix: str) -> list:
        return [normalize_token(token, {}, prefix) for token in tokens]


if __name__ == "__main__":
    serve(Surgeon(), ())
