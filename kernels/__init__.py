"""Selective scan, the recurrence of Mamba: one function, several implementations (see `selective_scan.py`)."""

from kernels.selective_scan import selective_scan

__all__ = ["selective_scan"]
