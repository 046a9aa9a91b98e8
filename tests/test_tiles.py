"""Latent tiles and autoencoder tiles by known answers."""

from __future__ import annotations

import pytest
import torch

from coz.errors import UserError
from coz.models import sd2, vae_tiles
from coz.models.latent_tiles import Box, plan_tiles, predict_in_tiles, tile_weights


def test_latent_plan():
    assert plan_tiles(6, 6, tile=6, overlap=2) == [Box(0, 6, 0, 6)]
    assert plan_tiles(4, 9, tile=6, overlap=2) == [Box(0, 4, 0, 9)], "chosen by area, not by side"
    columns = [Box(top, top + 6, left, left + 6) for left in (0, 3) for top in (0, 1)]
    assert plan_tiles(7, 9, tile=6, overlap=2) == columns
    assert [box.left for box in plan_tiles(3, 20, tile=6, overlap=1)] == [*range(0, 17, 2), 17]


@pytest.mark.parametrize(("height", "width", "tile", "overlap"), [(2, 100, 6, 2), (1, 100, 6, 1), (9, 9, 3, 3), (9, 9, 3, -1)])
def test_tiles_that_cannot_advance_are_refused(height, width, tile, overlap):
    with pytest.raises(UserError, match="must exceed latent_overlap"):
        plan_tiles(height, width, tile=tile, overlap=overlap)


def test_what_every_tile_agrees_on_comes_through():
    latent = torch.randn(2, 4, 9, 14, generator=torch.Generator().manual_seed(0))
    sizes = []

    def identity(crops, owners, boxes):
        sizes.append(len(crops))
        for crop, owner, box in zip(crops, owners, boxes, strict=True):
            assert torch.equal(crop, box.crop(latent[owner]))
        return crops

    blended = predict_in_tiles(latent, identity, tile=6, overlap=2, batch_size=5)
    torch.testing.assert_close(blended, latent)
    assert sizes == [5, 5, 2], "tiles of both pictures share calls"


def test_weights_peak_between_the_uneven_centres():
    weights = tile_weights(8)
    assert weights.dtype == torch.float64
    assert divmod(int(weights.argmax()), 8) in ((4, 3), (4, 4))
    torch.testing.assert_close(weights, weights.flip(1))
    assert not torch.equal(weights, weights.flip(0))


def test_autoencoder_plan():
    whole = [vae_tiles.Span(0, 64, 0, 64)]
    assert vae_tiles.plan_spans(64, tile=96, margin=32) == whole
    first, second = vae_tiles.plan_spans(192, tile=96, margin=32)
    assert first == vae_tiles.Span(0, 128, 0, 96)
    assert second == vae_tiles.Span(64, 192, 96, 192)


@pytest.fixture(scope="module")
def vae():
    return sd2.Weights.find("random", parts=["vae"], what="", size_gb=0, size="tiny").vae()


@torch.no_grad()
def test_one_tile_is_the_whole_network(vae):
    """Our passes through encoder and decoder equal diffusers' where there is nothing to pool."""
    picture = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    latent = torch.randn(2, 4, 4, 5, generator=torch.Generator().manual_seed(2))
    for run, net, x in ((vae_tiles._encoder_pass, vae.encoder, picture), (vae_tiles._decoder_pass, vae.decoder, latent)):
        (output,) = vae_tiles._run_in_step([run(net, x)], device=x.device)
        torch.testing.assert_close(output, net(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_tiles_of_the_autoencoder_estimate_the_whole(vae):
    """Seams stay small, and every picture of a batch has its own statistics."""
    coarse = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(3))
    picture = torch.nn.functional.interpolate(coarse, scale_factor=40)
    picture[1] *= 0.2
    whole = vae_tiles.encode_moments(vae, picture, tile_px=1024)
    tiled = vae_tiles.encode_moments(vae, picture, tile_px=64)
    assert 0 < (whole - tiled).abs().mean() < 0.4 * whole.std()
    alone = vae_tiles.encode_moments(vae, picture[1:], tile_px=64)
    torch.testing.assert_close(alone, tiled[1:], rtol=1e-4, atol=1e-4)
