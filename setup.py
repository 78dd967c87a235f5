"""Settings that pyproject.toml lacks: finds packages, and installs the folder configs/ as vimd_jax.configs."""

from setuptools import find_packages, setup

PACKAGES = find_packages(include=["kernels*", "vimd_jax*", "weight_convert*"])

setup(packages=[*PACKAGES, "vimd_jax.configs"], package_dir={"vimd_jax.configs": "configs"})
