"""How far a chain runs from the one that the authors' code recorded, step by step, on this CPU.

    python benchmarks/recorded_chains.py --set DIR/osediff_sd3          # a parity set with a folder chain/

Every step starts from our own last state, with the recorded noise and embeddings and `precision=released`, on one thread.
One line per step: the largest difference in grey levels, how many values differ, and the share of pixels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from coz.backbones.osediff_sd3 import OSEDiffSD3
from coz.image import CENTER, from_pil, resize, to_uint8, view_at


def main() -> None:
    """Run every recorded chain again and print what differs."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--set", type=Path, required=True, help="a parity set of OSEDiff on SD3, with its recorded chains")
    folder = options.parse_args().set
    chain_file = folder / "chain" / "chain.json"
    if not chain_file.is_file():
        options.error(f"{chain_file} is missing; give a set with recorded chains")
    torch.set_num_threads(1)
    print(f"PyTorch {torch.__version__}, kernels for {torch.backends.cpu.get_cpu_capability()}, one thread")

    chain = json.loads(chain_file.read_text())
    tensors = load_file(folder / "chain" / "prompt_embeds.safetensors")
    noise = load_file(folder / "chain" / "noise.safetensors")
    backbone = OSEDiffSD3(
        weights=str(folder / "pipeline"),
        lora=str(folder / "sr_lora.pkl"),
        vae_encoder=str(folder / "vae_encoder.pt"),
        lora_rank=None,
        device="cpu",
        precision="released",
    )
    for run, recorded in chain["runs"].items():
        first = state = from_pil(Image.open(folder / "chain" / run / "0.png"))
        for step, prompt in enumerate(recorded["prompts_used"], start=1):
            recursive = run.startswith("recursive")
            factor = chain["upscale"] if recursive else chain["upscale"] ** step
            view = view_at(state.shape[-1], factor, CENTER).crop(state if recursive else first)
            i = chain["prompt_embeds_index"][prompt]
            embeds = {name: tensors[f"{i}.{name}"] for name in ("prompt_embeds", "pooled_embeds")}
            image = backbone.restore(resize(view, state.shape[-1]) * 2 - 1, noise=noise[f"step{step}"], **embeds) * 0.5 + 0.5
            found = to_uint8(image, rounding="truncate")[0]
            expected = np.asarray(Image.open(folder / "chain" / run / f"{step}.png").convert("RGB"))
            off = np.abs(found.astype(int) - expected)
            pixels = (off > 0).any(-1).mean()
            print(
                f"{run:28} step {step}: {off.max():3} levels, {(off > 0).sum():6} values, {pixels:8.3%} of pixels", flush=True
            )
            state = from_pil(Image.fromarray(found))


if __name__ == "__main__":
    main()
