"""Package layout; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # kernels/ installs as tli_engine.kernels, never as a top-level ``kernels``: that name belongs
    # to another distribution, which transformers imports
    packages=[*find_packages(include=["tli_engine", "tli_engine.*"]), "tli_engine.kernels"],
    package_dir={"tli_engine.kernels": "kernels"},
)
