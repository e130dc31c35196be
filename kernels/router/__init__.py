"""Top-k routing and its losses, each one kernel beside its reference."""
