"""What pyproject.toml cannot say: packages are found, and the folder configs/ is installed as vimd_jax.configs."""

from setuptools import find_packages, setup

PACKAGES = find_packages(include=["kernels*", "vimd_jax*", "weight_convert*"])

setup(packages=[*PACKAGES, "vimd_jax.configs"], package_dir={"vimd_jax.configs": "configs"})
