"""Trains a model: `atom-jax train`, or python -m atom_jax train.

    python train.py --config=configs/lm.py:quick --workdir=runs/quick [--set optim.learning_rate=1e-3 train.steps=9]

The same command continues a run that was interrupted. WORKDIR receives metrics.jsonl, tb/ (TensorBoard), plots/,
checkpoints/ and experiment.json. `python -m atom_jax generate --checkpoint=WORKDIR` uses the result.
"""

import sys

from atom_jax.__main__ import script

if __name__ == "__main__":
    sys.exit(script("train", sys.argv))
