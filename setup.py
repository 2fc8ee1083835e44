"""The packages of a wheel; all else stands in pyproject.toml, which cannot map configs/ into the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["arrag_jax", "arrag_jax.*"]), "arrag_jax.configs"],
    package_dir={"arrag_jax.configs": "configs"},
)
