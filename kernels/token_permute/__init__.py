"""Tokens into expert order and back within one process: routing, padding, sums over rows."""
