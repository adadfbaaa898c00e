"""Evaluates a checkpoint: `atom-jax eval`, or python -m atom_jax eval.

    python eval.py --checkpoint=PATH --tasks=bpb,lambada [--set lambada.limit=1000 ...] [--out=FILE.json]

PATH is anything `atom_jax.load` takes: a training directory, a Hugging Face directory, an Orbax directory, a .gguf
file. Settings are the fields of atom_jax.evaluation.tasks.EvalConfig. Most tasks need `make evaldata` once; bpb on
the built-in text needs nothing. With --out the results go to a JSON file, and an interrupted evaluation goes on where
it was when the same command is given again.

The task kv compares cache policies: python eval.py --checkpoint=PATH --tasks=kv --out=FILE.json --set
kv.policies=tova,snapkv:window=64 kv.budgets=512,256 kv.parts=loss,needle; FILE.png: added loss over entries held.

On two CPU cores SmolLM2-135M reads about 300 tokens a second: 1,000 documents of LAMBADA take 5 minutes.
"""

import sys

from atom_jax.__main__ import script

if __name__ == "__main__":
    sys.exit(script("eval", sys.argv))
