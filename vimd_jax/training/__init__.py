"""What vimd_jax/train.py is made of."""
