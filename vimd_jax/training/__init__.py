"""The parts of vimd_jax/train.py."""
