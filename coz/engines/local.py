"""This machine: prompter and backbone side by side in this process, metrics in processes beside it."""

from __future__ import annotations

from coz.engines.base import Outcome, Work
from coz.errors import UserError
from coz.evaluation import StateMaker
from coz.metric_workers import MetricWorkers, workers_for
from coz.store import StateStore


class LocalEngine:
    """Several of these may share a store: each claims the batches that it computes."""

    def __init__(self, *, metric_workers: int | None = None, overlap: bool = True) -> None:
        """Args:
        overlap: ask for the prompts of one batch while the backbone restores another; False saves the memory of one of them.
        metric_workers: so many processes for metrics; None takes half of the cores where there is enough to measure.

        Raises:
            UserError: a negative number.
        """
        workers_for(metric_workers, 0)
        self._metric_workers, self._overlap = metric_workers, overlap

    def run(self, work: Work) -> Outcome:
        """See `Engine`."""
        parallel = sum(getattr(metric, "parallel", False) for metric in work.metrics)
        workers = MetricWorkers(workers_for(self._metric_workers, parallel * len(work.photos)), work.metrics)
        maker = StateMaker(
            store=StateStore(work.states),
            settings=work.settings,
            plan=work.plan,
            on_state=lambda count: work.on_state(count),  # type: ignore[arg-type,return-value]
            on_done=workers.submit,
            overlap=self._overlap,
        )
        try:
            lineages = maker.run(work.photos)
            workers.wait()
        except BaseException:  # Ctrl-C included: nobody will ask for what has not been measured yet
            workers.cancel()
            raise
        if not lineages and maker.failures:
            raise UserError(f"none of the {len(work.photos)} photographs gave a state; the first: {maker.failures[0].reason}")
        return Outcome(lineages, maker.failures, maker.timing)
