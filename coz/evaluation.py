"""The states of one method at one scale on this machine: from the store, or computed into it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coz.chain import StepSettings
from coz.data.photos import Photo
from coz.errors import UserError
from coz.stages import Failure, Lineage, Outlook, Plan, Reference, Stages, plan_for, step_of
from coz.store import CannotWrite, StateStore, StoredState

__all__ = ["Failure", "Lineage", "Plan", "Reference", "StateMaker", "Timing", "plan_for"]

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]


@dataclass
class Timing:
    """What this run computed itself: how many states, and the wall-clock seconds that took."""

    states: int = 0
    seconds: float = 0.0


class StateMaker:
    """Computes the states of a plan into a store, each once, in fixed batches.

    A batch is a fixed run of the list of photographs and is computed whole as soon as one of its states is missing, so
    that a killed run goes on with the same batches and ends with the same bytes.
    """

    def __init__(
        self,
        *,
        store: StateStore,
        settings: StepSettings,
        plan: Plan,
        on_state: Progress = lambda count: None,
        on_done: Callable[[Sequence[Lineage]], None] = lambda batch: None,
    ) -> None:
        """Args:
        on_state: told how many states came about.
        on_done: told of each batch that reached its last states, before the next is begun.
        """
        self._stages = Stages(store=store, settings=settings, plan=plan)
        self._store, self._plan, self._on_state, self._on_done = store, plan, on_state, on_done
        self.timing = Timing()
        self.failures: list[Failure] = []

    def run(self, photos: Sequence[Photo]) -> list[Lineage]:
        """The final state of every photograph that could be computed, in order; the others are in `failures`."""
        lineages = [lineage for photo in photos if (lineage := self._start(photo)) is not None]
        size = self._plan.batch_size
        batches = [lineages[i : i + size] for i in range(0, len(lineages), size)]
        waiting = [batch for batch in batches if not self._try(batch, wait=False)]
        for batch in waiting:  # another process had claimed these
            self._try(batch, wait=True)
        return self._succeeded(lineages)

    def _succeeded(self, lineages: Sequence[Lineage]) -> list[Lineage]:
        failed = {failure.photo for failure in self.failures}
        return [lineage for lineage in lineages if lineage.photo.name not in failed]

    def _try(self, batch: Sequence[Lineage], *, wait: bool) -> bool:
        """`_advance`, where an image that cannot be restored fails alone and after a second try."""
        try:
            if not self._advance(batch, wait=wait):
                return False
        except UserError:
            raise
        except Exception:
            logger.exception("a batch failed (%s); trying its images one by one", ", ".join(i.photo.name for i in batch))
            for lineage in batch:
                self._try_again(lineage)
        self._on_done(self._succeeded(batch))
        return True

    def _try_again(self, lineage: Lineage) -> None:
        try:
            self._advance([lineage], wait=True)
        except UserError:
            raise
        except Exception as error:
            logger.exception("second try")
            self._fail(lineage.photo, error)

    def _start(self, photo: Photo) -> Lineage | None:
        try:
            return self._stages.start(photo)
        except CannotWrite:
            raise
        except (UserError, OSError) as error:
            self._fail(photo, error)
            return None

    def _fail(self, photo: Photo, error: Exception) -> None:
        logger.error("%s failed: %s", photo.name, error)
        self.failures.append(Failure(photo.name, str(error) or type(error).__name__))
        self._on_state(len(self._plan.factors))

    def _advance(self, batch: Sequence[Lineage], *, wait: bool) -> bool:
        """Bring a batch to its last state; False where another process holds one of its states."""
        steps = range(1 + step_of(batch[0]), len(self._plan.factors) + 1)
        return all(self._step(batch, step, wait=wait) for step in steps)

    def _step(self, batch: Sequence[Lineage], step: int, *, wait: bool) -> bool:
        outlook = self._stages.look(batch, step)
        states = self._stages.stored(outlook)
        if states is None:
            with self._store.claim(outlook.keys, wait=wait) as claimed:
                if not claimed:
                    return False
                # another process may have finished meanwhile
                states = self._stages.stored(outlook) or self._compute(batch, outlook)
        self._stages.follow(batch, outlook, states)
        self._on_state(len(batch))
        return True

    def _compute(self, batch: Sequence[Lineage], outlook: Outlook) -> list[StoredState]:
        began = time.perf_counter()
        prompts = self._stages.ask(batch, outlook)
        states = self._stages.restore(batch, outlook, prompts)
        self.timing.seconds += time.perf_counter() - began
        self.timing.states += len(batch)
        return states
