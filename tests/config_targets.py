"""The nodes of a configuration that name code."""

from __future__ import annotations

from omegaconf import DictConfig, ListConfig


def targets(node: object, path: str = "") -> list[tuple[str, DictConfig]]:
    """(path, node) of every node with a `_target_`, those in lists included; nothing is resolved."""
    found = []
    if isinstance(node, DictConfig):
        if "_target_" in node:
            found.append((path, node))
        for key in node:
            found += targets(node._get_node(key), f"{path}.{key}")
    elif isinstance(node, ListConfig) and not node._is_none() and not node._is_missing():
        for index in range(len(node)):
            found += targets(node._get_node(index), f"{path}.{index}")
    return found
