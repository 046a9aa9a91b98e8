"""How long S3Diff and SeeSR take per image, and what each optimisation gives, on mid-size random weights.

    python benchmarks/sd2_backbones.py [--model s3diff|seesr] [--device cuda] [--precision bf16] [--size full]

The first line is the straightforward way of the authors' codes: one image, one tile and one half of the guidance at a
time, softmax attention written out, prompts encoded for every image, adapters beside the weights, the ControlNet's
picture embedded at every step. Each further line adds one optimisation to those above it. Mid-size networks have a
quarter of the released widths and ranks, at full depth, so that every part keeps its share of the work.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from coz.backbones import s3diff, seesr
from coz.image import resize
from coz.models import sd2, sd2_lora
from coz.models.degradation_modulation import DegradationNet
from coz.models.image_attention import ConditionEmbedder, build_controlnet_with_images, build_unet_with_images, wake_up
from coz.models.random_tokenizers import CLIP_PAD_SD2, clip_tokenizer

Setting = Callable[[object], None]


def mid_size() -> dict[str, dict]:
    """The released architectures with a quarter of the widths."""
    parts = sd2.architecture("full")
    for part in ("unet", "controlnet"):
        parts[part] |= {"block_out_channels": [80, 160, 320, 320], "attention_head_dim": [5, 10, 20, 20]}
        parts[part] |= {"cross_attention_dim": 256, "norm_num_groups": 16}
    parts["controlnet"]["conditioning_embedding_out_channels"] = [4, 8, 24, 64]
    parts["vae"] |= {"block_out_channels": [32, 64, 128, 128]}
    parts["text_encoder"] |= {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 2048}
    return parts


def write_models(folder: Path) -> None:
    """Mid-size models in the layouts of the released ones."""
    parts = mid_size()
    base = folder / "base"
    builders = {"unet": sd2.build_unet, "vae": sd2.build_vae, "text_encoder": sd2.build_text_encoder}
    nets = {}
    for index, (part, build) in enumerate(builders.items()):
        nets[part] = sd2.build_random(lambda build=build, part=part: build(parts[part]), seed=index)
        nets[part].save_pretrained(base / part)
    clip_tokenizer(pad_token=CLIP_PAD_SD2).save_pretrained(base / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (base / "tokenizer" / name).touch()
    (base / "scheduler").mkdir()
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(parts["scheduler"]))
    checkpoint = s3diff.random_checkpoint(nets["unet"], nets["vae"], ranks={"unet": 8, "vae": 4}, seed=0)
    torch.save(checkpoint, folder / "s3diff.pkl")
    torch.save(DegradationNet.of_width(16, 32).state_dict(), folder / "de_net.pth")
    sd2.build_random(lambda: build_unet_with_images(parts["unet"]), seed=3).save_pretrained(folder / "seesr" / "unet")
    control = sd2.build_random(lambda: wake_up(build_controlnet_with_images(parts["controlnet"])), seed=4)
    control.save_pretrained(folder / "seesr" / "controlnet")


# ---------------------------------------------------------------------------------------------------------------------
# the straightforward way


class OneAtATime(nn.Module):
    """A network that is called for every sample of a batch by itself."""

    def __init__(self, net: nn.Module, model: object) -> None:
        super().__init__()
        self.net, self.model = net, model

    def forward(self, sample: Tensor, timestep: int, *tensors: Tensor, **settings: object) -> object:
        """As the network's own; whatever has the batch's length is cut up."""
        count, context = len(sample), getattr(self.model, "_context", None)
        embeds = None if context is None else context.embeds

        def cut(value: object, index: int) -> object:
            if isinstance(value, list | tuple):
                return [cut(part, index) for part in value]
            return value[index : index + 1] if isinstance(value, Tensor) and len(value) == count else value

        outputs = []
        for index in range(count):
            if context is not None:
                context.embeds = embeds[index : index + 1]
            rest = {name: cut(value, index) for name, value in settings.items()}
            outputs.append(self.net(cut(sample, index), timestep, *(cut(tensor, index) for tensor in tensors), **rest))
        if context is not None:
            context.embeds = embeds
        return tuple(
            [torch.cat(same) for same in zip(*parts, strict=True)] if isinstance(parts[0], list | tuple) else torch.cat(parts)
            for parts in zip(*outputs, strict=True)
        )


class ForgetfulEmbedder(ConditionEmbedder):
    """Embeds the picture at every step."""

    def __init__(self, remembering: ConditionEmbedder) -> None:
        self.net = remembering.net

    def crops(self, owners: Tensor, boxes: list) -> Tensor:
        self._known = {}
        return super().crops(owners, boxes)


def straightforward(model: object) -> None:
    """Undo every optimisation of a loaded backbone."""
    from diffusers.models.attention_processor import Attention, AttnProcessor

    model.encode_prompts.capacity = 0
    model.batch_size = model.codec.batch_size = model.vae_batch_size = 1
    for net in networks(model):
        for layer in net.modules():
            if isinstance(layer, Attention):
                layer.set_processor(AttnProcessor())
    set_folding(False)(model)
    model._unet = OneAtATime(model._unet, model)
    if hasattr(model, "_control"):
        model._control = OneAtATime(model._control, model)
        model._remembering, model._conditions = model._conditions, ForgetfulEmbedder(model._conditions)


def networks(model: object) -> list[nn.Module]:
    """Its networks with attention."""
    return [net for net in (model._unet, model.codec.vae, getattr(model, "_control", None)) if net is not None]


def use_fused_attention(model: object) -> None:
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    for net in networks(model):
        for layer in net.modules():
            if isinstance(layer, Attention):
                layer.set_processor(AttnProcessor2_0())


def remember_prompts(model: object) -> None:
    model.encode_prompts.capacity = 512


def set_folding(fold: bool) -> Setting:
    def setting(model: object) -> None:
        for net in networks(model):
            for layer in net.modules():
                if isinstance(layer, sd2_lora.ModulatedLayer):
                    layer.fold = fold

    return setting


def embed_conditions_once(model: object) -> None:
    model._conditions = model._remembering


def guide_in_one_call(model: object) -> None:
    model._unet = model._unet.net
    if hasattr(model, "_control"):
        model._control = model._control.net


def batch_tiles(model: object) -> None:
    model.batch_size = 8


def batch_images(model: object) -> None:
    model.codec.batch_size = model.vae_batch_size = 4
    model.images_together = True


OPTIMISATIONS: dict[str, dict[str, Setting]] = {
    "s3diff": {
        "straightforward": straightforward,
        "fused attention": use_fused_attention,
        "prompts encoded once": remember_prompts,
        "adapters folded": set_folding(True),
        "guidance in one call": guide_in_one_call,
        "tiles in batches": batch_tiles,
        "images in batches": batch_images,
    },
    "seesr": {
        "straightforward": straightforward,
        "fused attention": use_fused_attention,
        "prompts encoded once": remember_prompts,
        "picture embedded once": embed_conditions_once,
        "guidance in one call": guide_in_one_call,
        "tiles in batches": batch_tiles,
        "images in batches": batch_images,
    },
}


def build(name: str, folder: Path, args: argparse.Namespace) -> object:
    """A loaded backbone: mid-size from files, full size at random."""
    shared = {"device": args.device, "precision": args.precision, "latent_tile": args.tile, "latent_overlap": args.tile // 3}
    shared |= {"color_fix": "none"}
    if args.size == "full":
        shared |= {"weights": sd2.RANDOM, "size": "full"}
    else:
        shared |= {"weights": str(folder / "base")}
        paths = {"checkpoint": str(folder / "s3diff.pkl"), "degradation_checkpoint": str(folder / "de_net.pth")}
        shared |= paths if name == "s3diff" else {"checkpoint": str(folder / "seesr"), "tagger": seesr.SilentTagger()}
    model = s3diff.S3Diff(**shared) if name == "s3diff" else seesr.SeeSR(steps=args.steps, process_px=args.target, **shared)
    model.load()
    return model


@torch.no_grad()
def measure(model: object, views: Tensor, args: argparse.Namespace) -> tuple[float, Tensor]:
    """Seconds per image, the best of `args.repeats`, and the images.

    On a CPU, seconds of the processor: other work on the machine disturbs them less. Take one thread.
    """
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    best = float("inf")
    for _ in range(args.repeats):
        start = clock()
        calls = [list(range(len(views)))] if getattr(model, "images_together", False) else [[i] for i in range(len(views))]
        images = torch.cat([model(views[call], size=args.target, prompts=["a stone wall"] * len(call)) for call in calls])
        best = min(best, (clock() - start) / len(views))  # the results are on the CPU: the device has finished
    return best, images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(OPTIMISATIONS), action="append")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--size", choices=["mid", "full"], default="mid")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--target", type=int, default=512)
    parser.add_argument("--tile", type=int, default=48, help="latent pixels; 96 is the released setting, without tiles at 512")
    parser.add_argument("--steps", type=int, default=2, help="of SeeSR; the released setting is 50")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    coarse = torch.rand(args.images, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    views = resize(coarse, args.target // 4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.size == "mid":
            write_models(folder)
        for model_name in args.model or OPTIMISATIONS:
            model = build(model_name, folder, args)
            print(f"{model_name}, {args.size} size, {args.device}, {args.precision}, {args.target} px, tile {args.tile}")
            print(f"{'':24s}  s/image   gain  total  max difference")
            first = before = None
            for label, setting in OPTIMISATIONS[model_name].items():
                setting(model)
                seconds, images = measure(model, views, args)
                first, before = first or (seconds, images), before or seconds
                difference = float((images - first[1]).abs().max())
                gain, total = before / seconds, first[0] / seconds
                print(f"{label:24s} {seconds:8.3f} {gain:6.2f} {total:6.2f}  {difference:.1e}", flush=True)
                before = seconds


if __name__ == "__main__":
    main()
