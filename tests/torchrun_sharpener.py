"""What `test_training_processes` starts with torchrun: train to the end, or until SIGTERM at a step.

python tests/torchrun_sharpener.py FOLDER PHOTOS [STOP_AT]
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from test_training_loop import make_run


def main(folder: Path, photos: Path, stop_at: int | None) -> None:
    run = make_run(folder, photos)
    if stop_at is not None and run.accelerator.process_index == 1:  # one process is warned; all must stop together
        run.on_step = lambda done: os.kill(os.getpid(), signal.SIGTERM) if done == stop_at else None
    run.run()
    assert run.accelerator.num_processes == 2


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
