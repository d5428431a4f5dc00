import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from davae.errors import DavaeError
from davae.evaluation import PatchSet, sliced_wasserstein, wasserstein_1d
from davae.evaluation.metrics.sliced_wasserstein import _blur, default_levels, laplacian_pyramid


def _images(count: int, seed: int, size: int = 64) -> Tensor:
    """Broad patches of colour with fine noise on top, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    broad = torch.nn.functional.interpolate(torch.rand(count, 3, 8, 8, generator=generator) - 0.5, size, mode="bicubic")
    return (broad + 0.2 * torch.randn(count, 3, size, size, generator=generator)).clamp(-1, 1)


def test_one_dimension_by_hand() -> None:
    a = torch.tensor([[0.0], [2.0], [1.0]])
    b = torch.tensor([[1.0], [5.0], [1.0]])  # sorted gaps: 1, 0, 3
    assert wasserstein_1d(a, b).item() == pytest.approx(4 / 3)
    assert wasserstein_1d(a, b, order=2).item() == pytest.approx((10 / 3) ** 0.5)


def test_unequal_sizes_are_exact() -> None:
    # u in [0, 1/3): |0 - 0|; [1/3, 1/2): |1 - 0|; [1/2, 2/3): |1 - 3|; [2/3, 1]: |2 - 3|
    a, b = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [3.0]])
    assert wasserstein_1d(a, b).item() == pytest.approx(1 / 6 + 2 / 6 + 1 / 3)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(37, 4, generator=generator), torch.randn(60, 4, generator=generator) + 0.3
    expected = [wasserstein_distance(a[:, i].numpy(), b[:, i].numpy()) for i in range(4)]
    torch.testing.assert_close(wasserstein_1d(a, b).double(), torch.tensor(expected), rtol=0, atol=1e-6)


def test_single_projection_by_hand() -> None:
    # One pixel, one channel, one level: the only direction is +1 or -1 and every patch is the pixel itself.
    a = torch.tensor([-0.5, 0.5]).view(2, 1, 1, 1)
    b = torch.tensor([0.1, 0.9]).view(2, 1, 1, 1)
    values = torch.tensor([-0.5, 0.5, 0.1, 0.9])
    expected = 0.5 / values.std(correction=0)  # mean gap (0.6 + 0.4) / 2 in units of the pooled deviation
    found = sliced_wasserstein(a, b, levels=1, patch=1, patches_per_image=3, projections=1)
    assert found == {0: pytest.approx(expected.item(), abs=1e-6)}


def test_zero_on_equal_sets_symmetric_and_reproducible() -> None:
    a, b = _images(6, 0), _images(6, 1) * 0.8
    settings = {"projections": 32, "patches_per_image": 32}
    assert list(sliced_wasserstein(a, a.clone(), **settings).values()) == [0.0, 0.0, 0.0]
    there, back = sliced_wasserstein(a, b, **settings), sliced_wasserstein(b, a, **settings)
    assert list(there) == [0, 1, 2]
    assert all(value > 0.01 for value in there.values())
    assert there == pytest.approx(back, rel=1e-6)
    assert there == sliced_wasserstein(a, b, **settings)
    assert there != sliced_wasserstein(a, b, seed=1, **settings)


def test_the_seed_decides_where_patches_are_cut() -> None:
    images = _images(2, 0)
    first, again, other = (PatchSet(seed=seed).update(images).points(0) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_batches_and_chunks_do_not_change_the_result() -> None:
    a, b = _images(7, 0), _images(5, 1)
    whole = sliced_wasserstein(a, b, projections=32, patches_per_image=32)
    assert sliced_wasserstein(a, b, projections=32, patches_per_image=32, batch_size=3) == whole
    sets = [PatchSet(patches_per_image=32).update(x) for x in (a, b)]
    assert sets[0].distance(sets[1], projections=32, chunk=5) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("normalise", ["pooled", "each"])
def test_grows_with_blur_at_the_finest_level(normalise: str) -> None:
    real, other = _images(24, 0), _images(24, 1)
    distances = []
    for times in range(4):
        distances.append(sliced_wasserstein(real, other, projections=64, normalise=normalise)[0])
        other = _blur(other)
        if times == 0 and normalise == "each":
            # Normalised on its own, the shape of the distribution is all that is left to differ.
            assert distances[0] < 0.05
    assert distances == sorted(distances)
    assert distances[-1] > 3 * distances[0]


def test_published_normalisation_does_not_see_contrast_and_pooled_does() -> None:
    real, other = _images(24, 0), _images(24, 1)
    for scale in (1.0, 0.5):
        each = sliced_wasserstein(real, other * scale, projections=32, normalise="each")
        if scale == 1.0:
            same = each
    assert each == pytest.approx(same, rel=1e-3)
    pooled = sliced_wasserstein(real, other * 0.5, projections=32)
    assert pooled[0] > 5 * same[0]


def test_pyramid_sums_back_to_the_image_and_separates_scales() -> None:
    image = _images(2, 0).double()
    fine, middle, coarse = laplacian_pyramid(image, 3)
    assert fine.shape[-1] == 64
    assert coarse.shape[-1] == 16

    def expand(x: Tensor) -> Tensor:
        spread = torch.zeros(*x.shape[:2], x.shape[2] * 2, x.shape[3] * 2, dtype=x.dtype)
        spread[..., ::2, ::2] = 4 * x
        return _blur(spread)

    torch.testing.assert_close(fine + expand(middle + expand(coarse)), image, rtol=0, atol=1e-12)
    flat = torch.full((1, 3, 32, 32), 0.3)
    bands = laplacian_pyramid(flat, 2)
    # Mirrored borders keep a flat image flat, but for the border that zero insertion cannot mirror evenly.
    assert bands[0][..., 2:-2, 2:-2].abs().max() < 1e-6
    torch.testing.assert_close(bands[1], torch.full((1, 3, 16, 16), 0.3))


def test_levels() -> None:
    assert [default_levels(side, side) for side in (8, 16, 31, 32, 128, 1024)] == [1, 1, 1, 2, 4, 7]
    with pytest.raises(DavaeError, match="at most 2"):
        laplacian_pyramid(torch.zeros(1, 3, 36, 36), 4)


def test_mistakes_are_named() -> None:
    with pytest.raises(DavaeError, match="empty"):
        PatchSet().distance(PatchSet())
    with pytest.raises(DavaeError, match="cut differently"):
        PatchSet(patch=5).update(_images(1, 0)).distance(PatchSet().update(_images(1, 0)))
    with pytest.raises(DavaeError, match="one size"):
        PatchSet().update(_images(1, 0)).update(_images(1, 0, size=32))
