"""What `test_training_processes` starts with torchrun: train to the end, or until SIGTERM at a step.

python tests/torchrun_sharpener.py FOLDER PHOTOS [--stop-at STEP] [--deepspeed CONFIG]
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

from test_training_loop import make_run


def main(folder: Path, photos: Path, stop_at: int | None, config: str | None) -> None:
    settings = {"deepspeed": Path(config), "ema_decay": 0.0 if "zero3" in config else 0.5} if config else {}
    run = make_run(folder, photos, **settings)
    if stop_at is not None and run.accelerator.process_index == 1:  # one process is warned; all must stop together
        run.on_step = lambda done: os.kill(os.getpid(), signal.SIGTERM) if done == stop_at else None
    run.run()
    assert run.accelerator.num_processes == 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--stop-at", type=int)
    parser.add_argument("--deepspeed")
    given = parser.parse_args()
    main(given.folder, given.photos, given.stop_at, given.deepspeed)
