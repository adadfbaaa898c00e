"""The packages; everything else is in pyproject.toml. What lies in configs/ is installed as atom_jax.configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["atom_jax*", "pallas_kernels*"]), "atom_jax.configs"],
    package_dir={"atom_jax.configs": "configs"},
)
