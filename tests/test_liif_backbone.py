"""LIIF as a backbone: odd shapes, batches, memory, mistakes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from coz.backbones.base import Backbone
from coz.backbones.liif import Liif
from coz.checkpoint import WeightsNotFound, WrongWeights
from coz.errors import UserError
from coz.models import liif


def _backbone(**settings):
    return Liif(**{"weights": "random", "size": "tiny", "device": "cpu", "precision": "fp32"} | settings)


def _views(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("encoder", ["edsr", "rdn"])
@pytest.mark.parametrize(("lr", "size"), [((5, 9), (13, 21)), ((7, 1), (28, 4)), ((1, 1), 3), ((8, 8), 5), ((4, 6), (4, 6))])
def test_any_shape_to_any_size(encoder, lr, size):
    backbone = _backbone(encoder=encoder)
    assert isinstance(backbone, Backbone)
    sr = backbone(_views(2, 3, *lr), size=size)
    assert sr.shape == (2, 3, *((size, size) if isinstance(size, int) else size))
    assert sr.dtype == torch.float32
    assert sr.device.type == "cpu"
    assert 0 <= sr.min() <= sr.max() <= 1
    assert sr.isfinite().all()


def test_batches_equal_single_images_whatever_the_number_of_queries():
    views = _views(3, 3, 6, 7)
    together = _backbone()(views, size=(20, 31))
    alone = torch.cat([_backbone(batch_queries=7)(view[None], size=(20, 31)) for view in views])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-4


def _plain_query(model, features, coords, cells):
    """LIIF as its paper writes it: unfold, look up, ask the whole MLP at each corner, blend by the opposite area."""
    height, width = features.shape[-2:]
    unfolded = F.unfold(features, 3, padding=1).view(1, -1, height, width)
    centers = torch.stack(torch.meshgrid(liif.axis_centers(height), liif.axis_centers(width), indexing="ij"))[None]
    scale = torch.tensor([height, width])
    look_up = lambda x, at: F.grid_sample(x, at.flip(-1)[None, None], mode="nearest", align_corners=False)[0, :, 0].t()  # noqa: E731
    answers, areas = [], []
    for down, right in liif.CORNERS:
        at = (coords + torch.tensor([down / height + 1e-6, right / width + 1e-6])).clamp(-1 + 1e-6, 1 - 1e-6)
        offset = (coords - look_up(centers, at)) * scale
        answers.append(model.imnet.layers(torch.cat((look_up(unfolded, at), offset, cells * scale), dim=-1)))
        areas.append(offset.prod(-1).abs() + 1e-9)
    return sum(a * (w / sum(areas))[:, None] for a, w in zip(answers, areas[::-1], strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("scale", [1, 2, 3, 5.3])
def test_folded_first_layer_changes_nothing(scale):
    backbone = _backbone(seed=3)
    backbone.load()
    features = backbone._model.encode(_views(1, 3, 9, 12))
    size = (round(9 * scale), round(12 * scale))
    coords = liif.pixel_centers(size)
    cells = torch.tensor([2 / size[0], 2 / size[1]]).expand_as(coords)
    expected = _plain_query(backbone._model, features, coords, cells)
    torch.testing.assert_close(backbone._model.query(features, coords, cells), expected, rtol=0, atol=2e-6)
    rendered = backbone._model.render(features, size).flatten(1).t()
    torch.testing.assert_close(rendered, expected, rtol=0, atol=2e-6)


def test_memory_does_not_grow_with_the_target():
    """But for the picture itself, no tensor is larger than one batch of hidden rows (the encoder's are smaller here)."""
    backbone = _backbone(batch_queries=128)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() != 3 * 80 * 80:
                largest = max(largest, out.numel())
            return out

    with Watch():
        backbone(_views(1, 3, 4, 4), size=80)
    assert 128 * 8 < largest <= 128 * 16


def test_weights_follow_the_seed_and_leave_the_global_generator_alone():
    view = _views(1, 3, 4, 4)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (_backbone(seed=seed)(view, size=8) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert _backbone(seed=0).fingerprint != _backbone(seed=1).fingerprint
    assert _backbone(size="tiny").fingerprint != _backbone(size="full").fingerprint


def test_mistakes_are_named_before_weights_load(tmp_path):
    with pytest.raises(WeightsNotFound, match=r"edsr-baseline-liif\.pth does not exist"):
        Liif(weights=str(tmp_path / "edsr-baseline-liif.pth"))
    with pytest.raises(UserError, match="encoder=swin"):
        _backbone(encoder="swin")
    with pytest.raises(UserError, match="size=huge"):
        _backbone(size="huge")
    with pytest.raises(UserError, match="batch_queries=0"):
        _backbone(batch_queries=0)


def test_wrong_checkpoints_are_refused(tmp_path):
    rdn = _backbone(encoder="rdn")
    rdn.load()
    path = tmp_path / "rdn.pth"
    torch.save({"model": {"name": "liif", "args": {}, "sd": rdn._model.state_dict()}}, path)
    Liif(weights=str(path), encoder="rdn", device="cpu").load()
    with pytest.raises(WrongWeights, match=r"set backbone\.encoder=rdn"):
        Liif(weights=str(path), encoder="edsr", device="cpu").load()

    state = rdn._model.state_dict()
    del state["encoder.RDBs.1.LFF.bias"]
    torch.save({"model": {"sd": state}}, path)
    with pytest.raises(WrongWeights, match=r"1 missing \(encoder\.RDBs\.1\.LFF\.bias\)"):
        Liif(weights=str(path), encoder="rdn", device="cpu").load()
    torch.save(state, path)
    with pytest.raises(WrongWeights, match="no LIIF checkpoint"):
        Liif(weights=str(path), encoder="rdn", device="cpu").load()
