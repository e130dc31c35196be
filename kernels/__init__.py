"""Kernels of the expert MLP and of the shard exchange, each beside its plain-torch reference."""
