"""Tokens between N ranks without the host: a plan, addresses, rows moved through peers' memory, and a barrier."""
