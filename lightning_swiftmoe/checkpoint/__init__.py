"""Checkpoints of sharded experts, as one process without a strategy would write and read them."""
