"""Metrics in processes of their own, beside the work that makes the pictures.

Values land beside their states (`measuring.cached_value`), where whoever asks for the rows finds them; so a worker that dies
loses only what it was measuring, and the rows do not depend on how many workers there were.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from coz.errors import UserError
from coz.measuring import cached_value
from coz.metrics import Metric
from coz.stages import Lineage

logger = logging.getLogger(__name__)

_WORTH_STARTING = 24  # values; a process takes seconds to import PyTorch, as long as a dozen NIQEs
_PENDING_PER_WORKER = 64  # bounds the memory of what waits, whatever the number of photographs


class MetricWorkers:
    """Measures finished lineages with those metrics that run well in a process of their own (`parallel`)."""

    def __init__(self, count: int, metrics: Sequence[Metric]) -> None:
        """Args:
        count: so many processes; 0 measures nothing here.
        """
        self._count, self._pending = count, deque[Future[object]]()
        self._metrics = [metric for metric in metrics if getattr(metric, "parallel", False)]

    def submit(self, batch: Sequence[Lineage]) -> None:
        """Begin to measure; waits for the oldest values where too many are pending."""
        if not self._count:
            return
        for lineage in batch:
            for metric in self._metrics:
                while len(self._pending) >= _PENDING_PER_WORKER * self._count:
                    self._finish(self._pending.popleft())
                try:
                    self._pending.append(_pool(self._count).submit(cached_value, lineage, metric))
                except BrokenProcessPool:
                    self._give_up()
                    return

    def wait(self) -> None:
        """Until everything submitted has been measured or has failed, which the rows then find out and say."""
        while self._pending:
            self._finish(self._pending.popleft())

    def cancel(self) -> None:
        """Leave out what no process has begun."""
        for future in self._pending:
            future.cancel()
        self._pending.clear()

    def _finish(self, future: Future[object]) -> None:
        try:
            future.result()
        except BrokenProcessPool:
            self._give_up()

    def _give_up(self) -> None:
        logger.warning("a metric's process was killed; what it had not measured is measured in the main process")
        _pool.cache_clear()
        self._pending.clear()
        self._count = 0


def workers_for(setting: int | None, values: int) -> int:
    """How many processes to use: as set, or half of this machine's cores where there are enough values to measure.

    Raises:
        UserError: a negative number.
    """
    if setting is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // 2) if values >= _WORTH_STARTING else 0
    if setting < 0:
        raise UserError(f"engine.metric_workers={setting} must be at least 0")
    return setting


@functools.lru_cache(maxsize=1)
def _pool(count: int) -> ProcessPoolExecutor:
    """Kept over the jobs of a sweep."""
    # A fork of a process with threads and CUDA can hang; a spawned one begins anew.
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    """In a worker: one thread, no answer to Ctrl-C, and no life after the main process."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=follow, daemon=True).start()
