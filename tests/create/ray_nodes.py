"""A Ray cluster of several nodes on this machine: raylets with workers of their own, under one head that has no cores.

A node is killed as a machine is: its raylet and all that runs under it, at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

STORE_BYTES = 80 * 2**20


class Nodes:
    """The cluster and its nodes."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address

    def add(self) -> Any:
        """A node with room for one worker."""
        return self._cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)

    def kill(self, node: Any) -> None:
        """SIGKILL to the node's raylet and all below it, which are stopped first, so that none outlives another."""
        raylet = node.all_processes["raylet"][0].process.pid
        doomed = [raylet, *below(raylet)]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in doomed:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def nodes(count: int) -> Iterator[tuple[Nodes, list[Any]]]:
    """A cluster with so many nodes."""
    cluster = Nodes()
    try:
        yield cluster, [cluster.add() for _ in range(count)]
    finally:
        cluster.close()


def below(pid: int) -> list[int]:
    """All processes that a process has started, and they."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError, IndexError):  # it ended meanwhile
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found, due = [], [pid]
    while due:
        children = [child for child, parent in parents.items() if parent in due]
        found += children
        due = children
    return found
