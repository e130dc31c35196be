"""Nested configurations by dotted name: ``model.top_k``."""

from __future__ import annotations

from typing import Any


def leaves(values: Any, key: str = "") -> dict[str, Any]:
    """``{"model.top_k": 2}`` of ``{"model": {"top_k": 2}}``, below ``key``; an empty dict is a leaf."""
    if not isinstance(values, dict) or not values:
        return {key: values}
    found: dict[str, Any] = {}
    for part, value in values.items():
        found.update(leaves(value, f"{key}.{part}".lstrip(".")))
    return found
