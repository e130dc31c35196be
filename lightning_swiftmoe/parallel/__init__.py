"""Experts on several ranks: who holds what, and how it moves."""
