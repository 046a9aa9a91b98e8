"""The states of one method at one scale on this machine: from the store, or computed into it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

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


Batch = Sequence[Lineage]


@dataclass
class _Step:
    """A batch at a step that has to be computed: what it looks at, its prompts, and the claim on its states."""

    batch: Batch
    outlook: Outlook
    prompts: Callable[[], list[str]]
    claim: ExitStack


@dataclass
class _Left:
    """Batches that did not get through: claimed by another process, or failed."""

    claimed: list[Batch] = field(default_factory=list)
    failed: list[tuple[Batch, Exception]] = field(default_factory=list)


class _Claimed(Exception):
    """Another process computes these states, or a batch under way here holds a lock that they share."""

    def __init__(self, keys: list[str]) -> None:
        self.keys = keys


class StateMaker:
    """Computes the states of a plan into a store, each once, in fixed batches.

    A batch is a fixed run of the list of photographs and is computed whole as soon as one of its states is missing, so
    that a killed run goes on with the same batches and ends with the same bytes. Two batches are under way at a time: a
    thread asks for the prompts of one while the backbone restores the other.
    """

    def __init__(
        self,
        *,
        store: StateStore,
        settings: StepSettings,
        plan: Plan,
        on_state: Progress = lambda count: None,
        on_done: Callable[[Batch], None] = lambda batch: None,
        overlap: bool = True,
    ) -> None:
        """Args:
        on_state: told how many states came about.
        on_done: told of each batch that reached its last states, before the next is begun.
        overlap: False asks and restores by turns, one batch after the other.
        """
        self._stages = Stages(store=store, settings=settings, plan=plan)
        self._store, self._plan, self._on_state, self._on_done = store, plan, on_state, on_done
        self._prompter, self._overlap, self._began = settings.prompter, overlap, 0.0
        self.timing = Timing()
        self.failures: list[Failure] = []

    def run(self, photos: Sequence[Photo]) -> list[Lineage]:
        """The final state of every photograph that could be computed, in order; the others are in `failures`."""
        lineages = [lineage for photo in photos if (lineage := self._start(photo)) is not None]
        size = self._plan.batch_size
        left = self._through([lineages[i : i + size] for i in range(0, len(lineages), size)], wait=False)
        # Who waits for another process holds no claim that this one may wait for: one batch at a time.
        failed = [*left.failed, *(entry for batch in left.claimed for entry in self._through([batch], wait=True).failed)]
        for batch, _ in failed:  # its images one by one
            for lineage in batch:
                for _, error in self._through([[lineage]], wait=True, report=False).failed:
                    self._fail(lineage.photo, error)
            self._on_done(self._succeeded(batch))
        order = {photo.name: index for index, photo in enumerate(photos)}
        self.failures.sort(key=lambda failure: order[failure.photo])
        return self._succeeded(lineages)

    def _succeeded(self, lineages: Batch) -> list[Lineage]:
        failed = {failure.photo for failure in self.failures}
        return [lineage for lineage in lineages if lineage.photo.name not in failed]

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

    # -----------------------------------------------------------------------------------------------------------------

    def _through(self, batches: Sequence[Batch], *, wait: bool, report: bool = True) -> _Left:
        """Bring batches to their last states.

        Args:
            wait: for states that another process has claimed; else their batch is left.
            report: tell `on_done`.
        """
        left, pending, under_way = _Left(), deque(batches), deque[_Step]()
        most = 2 if self._overlap else 1

        def fail(batch: Batch, error: Exception) -> None:
            if isinstance(error, UserError):
                raise error
            logger.error("failed: %s", ", ".join(lineage.photo.name for lineage in batch), exc_info=error)
            left.failed.append((batch, error))

        def enter(batch: Batch) -> bool:
            """False where the batch has to wait for the other one."""
            try:
                if step := self._next(batch, asker, wait=wait):
                    under_way.append(step)
                elif report:
                    self._on_done(batch)
            except _Claimed as claimed:
                stripes = self._store.stripes(claimed.keys)
                if any(stripes & self._store.stripes(step.outlook.keys) for step in under_way):
                    pending.appendleft(batch)
                    return False
                left.claimed.append(batch)
            except Exception as error:  # noqa: BLE001 (a user's mistake is raised again, the rest is logged)
                fail(batch, error)
            return True

        with ThreadPoolExecutor(1, thread_name_prefix="prompter") as asker:
            try:
                while pending or under_way:
                    while pending and len(under_way) < most and enter(pending.popleft()):
                        pass
                    if not under_way:
                        continue
                    step = under_way.popleft()
                    try:
                        self._finish(step)
                    except Exception as error:  # noqa: BLE001
                        fail(step.batch, error)
                    else:
                        enter(step.batch)
            finally:
                for step in under_way:
                    step.claim.close()
                asker.shutdown(cancel_futures=True)
        return left

    def _next(self, batch: Batch, asker: ThreadPoolExecutor, *, wait: bool) -> _Step | None:
        """Move a batch on past what is stored, and claim the next step; None where it is at its last state."""
        while (number := 1 + step_of(batch[0])) <= len(self._plan.factors):
            outlook = self._stages.look(batch, number)
            states = self._stages.stored(outlook)
            if states is None:
                with ExitStack() as claim:
                    if not claim.enter_context(self._store.claim(outlook.keys, wait=wait)):
                        raise _Claimed(outlook.keys)
                    states = self._stages.stored(outlook)  # another process may have finished meanwhile
                    if states is None:
                        return _Step(batch, outlook, self._ask(batch, outlook, asker), claim.pop_all())
            self._follow(batch, outlook, states)
        return None

    def _ask(self, batch: Batch, outlook: Outlook, asker: ThreadPoolExecutor) -> Callable[[], list[str]]:
        """The prompts to come, asked at once. At its turn, beside no backbone, where one of the two still loads its weights:
        loading sets what is global in PyTorch (the type of new tensors, the random numbers)."""
        self._began = self._began or time.perf_counter()
        loaded = self.timing.states > 0 and getattr(self._prompter, "beside_backbone", True)
        if self._overlap and loaded:
            return asker.submit(self._stages.ask, batch, outlook).result
        return lambda: asker.submit(self._stages.ask, batch, outlook).result()

    def _finish(self, step: _Step) -> None:
        with step.claim:
            states = self._stages.restore(step.batch, step.outlook, step.prompts())
        self.timing.seconds = time.perf_counter() - self._began
        self.timing.states += len(step.batch)
        self._follow(step.batch, step.outlook, states)

    def _follow(self, batch: Batch, outlook: Outlook, states: Sequence[StoredState]) -> None:
        self._stages.follow(batch, outlook, states)
        self._on_state(len(batch))
