"""The commands of `python -m atom_jax`. What they need they import when they run, so that help is quick."""
