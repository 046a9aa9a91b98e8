"""Prompts per second of the VLM prompter at several batch sizes, with random weights and a forced length.

    python benchmarks/vlm_prompts.py                        # a very small model on a CPU, in seconds
    python benchmarks/vlm_prompts.py --full-size            # Qwen2.5-VL-3B's architecture on a GPU, about 8 GB in bf16

Table 3 of the paper has 0.34–0.38 s per prompt (one at a time). An answer's length decides the time, so it is forced to 16
tokens here. What is timed is the whole call: pictures to tokens, prefill, decoding, text.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from coz.prompters.vlm import VlmPrompter

PAPER_S_PER_PROMPT = 0.36


def main() -> None:
    """Time every batch size and print a line of JSON for each."""
    options = _options()
    size = "full" if options.full_size else "tiny"
    prompter = VlmPrompter(
        weights="random",
        size=size,
        device=options.device,
        precision=options.precision,
        max_new_tokens=options.new_tokens,
        min_new_tokens=options.new_tokens,
        batch_size=max(options.batch),
    )
    prompter.load()
    device = prompter.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    for batch in options.batch:
        seconds = _time(prompter, batch, repeats=options.repeats, state_px=options.state_px)
        row = {
            "device": name,
            "size": size,
            "dtype": str(prompter.model.dtype).removeprefix("torch."),
            "state_px": options.state_px,
            "new_tokens": options.new_tokens,
            "batch": batch,
            "prompts_per_s": round(batch / seconds, 3),
            "s_per_prompt": round(seconds / batch, 4),
            "memory_estimate_gb": round(prompter.model.memory_gb, 2),
        }
        if device.type == "cuda":
            row["peak_memory_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
        if options.full_size:
            row["times_faster_than_table_3"] = round(PAPER_S_PER_PROMPT * batch / seconds, 2)
        print(json.dumps(row), flush=True)


def _time(prompter: VlmPrompter, batch: int, *, repeats: int, state_px: int) -> float:
    """The fastest of some calls on new pictures, in seconds; one more before them warms up."""
    generator = torch.Generator().manual_seed(batch)
    device = prompter.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(repeats + 1):
        current, context = (torch.rand(batch, 3, state_px, state_px, generator=generator) for _ in range(2))
        start = time.perf_counter()
        prompter(current, context)  # gives text, so the device has finished
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true", help="Qwen2.5-VL-3B's architecture instead of a very small one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--state-px", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
