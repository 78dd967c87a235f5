"""The selective scan of Mamba (Gu & Dao, "Mamba", 2023, arXiv:2312.00752, §3.2); `api.py` has the public function."""

from kernels.scan.api import selective_scan

__all__ = ["selective_scan"]
