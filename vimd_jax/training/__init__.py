"""What vimd_jax/train.py is made of."""


class TrainingError(Exception):
    """A run that cannot go on; the one-line message says why and what to do."""
