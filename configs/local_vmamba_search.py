"""Supernet that searches the scan directions of each layer of LocalVMamba, on ImageNet-1k.

Paper       LocalMamba: Visual State Space Model with Windowed Selective Scan, 2024, https://arxiv.org/abs/2403.09338
Command     python -m vimd_jax.train --config configs/local_vmamba_search.py --workdir workdir/local_vmamba_search \\
              --config.dataset.directory=DIR
            python -m vimd_jax.search --workdir workdir/local_vmamba_search \\
              --base configs/local_vmamba_tiny_imagenet.py --output configs/local_vmamba_found.py
            python -m vimd_jax.train --config configs/local_vmamba_found.py --workdir workdir/local_vmamba_found …
Data        as local_vmamba_tiny_imagenet.py
Recipe      that of the final network, for 100 epochs; the weights of the directions are trained like all others
Published   the directions of `local_vmamba_tiny`
Measured    not yet; a small search: docs/benchmarks.md
"""

from vimd_jax.configs import imagenet


def get_config():
    config = imagenet.local_mamba("local_vmamba_search")
    config.schedule.num_epochs = 100
    return config
