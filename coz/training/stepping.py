"""One step of the optimiser: plainly (one process, or DDP through accelerate), or with DeepSpeed's ZeRO."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from coz.errors import UserError
from coz.training.schedule import Schedule
from coz.training.trainee import Batch, Outcome

Groups = Mapping[str, Mapping[str, nn.Parameter]]


class NotFinite(UserError):
    """Too many steps in a row whose loss or gradient was not finite."""


class Stepping(Protocol):
    """Losses, gradients, and the update. Every method is called by all processes together."""

    def set_rate(self, rate: float) -> None: ...

    def losses(self, batch: Batch) -> Outcome: ...

    def collecting(self, last: bool) -> AbstractContextManager[object]:
        """Around losses and gradients of one of several batches of a step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one of the step's batches."""
        ...

    def update(self) -> tuple[bool, dict[str, float]]:
        """Clip and update; whether the gradients were finite, and their norms before."""
        ...

    def drop(self, done: int) -> None:
        """Forget the gradients of the `done` batches of this step."""
        ...

    def whole(self) -> AbstractContextManager[object]:
        """Inside it every process sees all parameters whole."""
        ...

    def state(self) -> dict[str, Any]:
        """Of the optimiser, whole on the first process."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


def adamw(groups: Groups, schedule: Schedule) -> torch.optim.AdamW:
    """One parameter group for each of ours."""
    return torch.optim.AdamW(
        [{"params": list(parameters.values())} for parameters in groups.values()],
        lr=schedule.learning_rate,
        betas=tuple(schedule.betas),
        weight_decay=schedule.weight_decay,
    )


class PlainStepping:
    """One process, or several that each hold everything. Each group's gradient is clipped on its own."""

    def __init__(self, module: nn.Module, groups: Groups, *, accelerator: Accelerator, schedule: Schedule) -> None:
        self._accelerator, self._groups, self._schedule = accelerator, groups, schedule
        self.model, self.optimizer = accelerator.prepare(module, adamw(groups, schedule))

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def losses(self, batch: Batch) -> Outcome:
        return self.model(batch)

    def collecting(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self._accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss / self._schedule.accumulation)

    def update(self) -> tuple[bool, dict[str, float]]:
        limit = self._schedule.clip_norm or math.inf
        norms = {
            f"grad_{name}": float(torch.nn.utils.clip_grad_norm_(parameters.values(), limit))
            for name, parameters in self._groups.items()
        }
        finite = all(math.isfinite(norm) for norm in norms.values())
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return finite, norms

    def drop(self, done: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def whole(self) -> AbstractContextManager[object]:
        return nullcontext()

    def state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(dict(state))


class ZeroStepping:
    """DeepSpeed's ZeRO: each process keeps a part of the optimiser (stage 2), and of the parameters too (stage 3).

    The gradient is clipped over both groups together, since DeepSpeed knows one norm.

    Args:
        config: a DeepSpeed configuration in JSON; batch sizes, clipping and number format in it are `auto`.

    Raises:
        UserError: no such file, DeepSpeed is not installed, or one process without torchrun.
    """

    def __init__(
        self, module: nn.Module, groups: Groups, *, accelerator: Accelerator, schedule: Schedule, config: Path
    ) -> None:
        settings = read_zero(config)
        import deepspeed

        self._accelerator, self._module = accelerator, module
        settings |= {
            "train_micro_batch_size_per_gpu": schedule.batch_size,
            "gradient_accumulation_steps": schedule.accumulation,
            "train_batch_size": schedule.batch_size * schedule.accumulation * accelerator.num_processes,
            "gradient_clipping": schedule.clip_norm,
            "bf16": {"enabled": accelerator.mixed_precision == "bf16"},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        self._stage = int(settings["zero_optimization"]["stage"])
        if self._stage == 3 and schedule.ema_decay:
            raise UserError("training.ema_decay needs whole parameters, which ZeRO-3 has not; use ZeRO-2, or ema_decay=0")
        self._trained = [parameter for parameters in groups.values() for parameter in parameters.values()]
        self._deepspeed = deepspeed
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=adamw(groups, schedule), config=settings
        )

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def losses(self, batch: Batch) -> Outcome:
        with self._accelerator.autocast():
            return self.engine(batch)

    def collecting(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext()  # DeepSpeed counts for itself

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        self.engine.step()  # does something at the last batch of a step only

    def update(self) -> tuple[bool, dict[str, float]]:
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        if not math.isfinite(norm):
            raise NotFinite(
                "the gradient was not finite, and DeepSpeed has applied it; the same command goes on from the last checkpoint: "
                "lower training.learning_rate under another name=…, or train without deepspeed, which skips such steps"
            )
        return True, {"grad_all": norm}

    def drop(self, done: int) -> None:
        if done:
            raise NotFinite(
                "a loss within an accumulated step was not finite, which DeepSpeed cannot take back; the same command goes on "
                "from the last checkpoint: use training.accumulation=1, or train without deepspeed"
            )

    def whole(self) -> AbstractContextManager[object]:
        if self._stage < 3:
            return nullcontext()
        return self._deepspeed.zero.GatheredParameters(list(self._module.parameters()), modifier_rank=0)

    def _masters(self) -> list[Tensor]:
        """This process's parts of the parameters in float32, which the optimiser changes."""
        name = "fp32_partitioned_groups_flat" if self._stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self.optimizer, name))

    def _shard(self) -> list[dict[str, Tensor]]:
        inner = self.optimizer.optimizer
        return [{"master": master.detach(), **inner.state.get(master, {})} for master in self._masters()]

    def state(self) -> dict[str, Any]:
        from accelerate.utils import gather_object

        own = [{name: value.detach().cpu().clone() for name, value in part.items()} for part in self._shard()]
        return {"shards": gather_object([own])}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        saved = state["shards"][self._accelerator.process_index]
        inner = self.optimizer.optimizer
        for master, part in zip(self._masters(), saved, strict=True):
            master.copy_(part["master"])
            values = {name: value for name, value in part.items() if name != "master"}
            if values:  # on the CPU, Adam's count of steps stays there
                inner.state[master] = {n: v if n == "step" else v.to(master.device) for n, v in values.items()}


def read_zero(config: Path) -> dict[str, Any]:
    """A configuration of ZeRO, and the refusal of what cannot work before any weight is read.

    Raises:
        UserError: no such file, DeepSpeed is not installed, or one process without torchrun.
    """
    if not config.is_file():
        raise UserError(f"zero={config} does not exist; conf/deepspeed holds sr_zero2.json and sr_zero3.json")
    try:
        settings = json.loads(config.read_text())
        stage = int(settings["zero_optimization"]["stage"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"zero={config} is no configuration of ZeRO ({error!r}); see conf/deepspeed") from error
    if stage not in (1, 2, 3):
        raise UserError(f"zero={config} has stage {stage}; use 1, 2 or 3, or leave zero=… out")
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise UserError("zero=… needs a process group; start with `torchrun --nproc_per_node N train_sr.py …`")
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise UserError("deepspeed is not installed; `pip install deepspeed`, or leave zero=… out") from error
    return settings
