import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from davae.errors import DavaeError
from davae.evaluation import psnr, ssim


def _pair(size: tuple[int, int] = (40, 33)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(3, 3, 5, 5, generator=generator) * 2 - 1
    a = torch.nn.functional.interpolate(smooth, size, mode="bicubic").clamp(-1, 1)
    noise = torch.randn(a.shape, generator=generator) * torch.tensor([0.02, 0.1, 0.4]).view(3, 1, 1, 1)
    return a, (a + noise).clamp(-1, 1)


def test_psnr_equals_scikit_image() -> None:
    a, b = _pair()
    expected = [peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=2.0) for x, y in zip(a, b)]
    torch.testing.assert_close(psnr(a, b).double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-4)


def test_psnr_by_hand() -> None:
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([a[0], a[0] + 0.2])
    value = psnr(a, b)
    assert math.isinf(value[0])
    assert value[1].item() == pytest.approx(20.0, abs=1e-4)  # 10 log10(4 / 0.04)


def test_ssim_equals_scikit_image() -> None:
    a, b = _pair()
    expected = [
        structural_similarity(
            x.double().numpy(),
            y.double().numpy(),
            data_range=2.0,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in zip(a, b)
    ]
    torch.testing.assert_close(ssim(a, b).double(), torch.tensor(expected).double(), rtol=0, atol=2e-5)


def test_ssim_of_one_pair_keeps_its_batch_and_equal_images_score_one() -> None:
    a, _ = _pair()
    assert ssim(a[:1], a[:1]).shape == (1,)
    torch.testing.assert_close(ssim(a, a), torch.ones(3))


def test_shapes_that_differ_are_refused_with_both() -> None:
    with pytest.raises(DavaeError, match=r"\[1, 3, 16, 16\] and \[2, 3, 16, 16\]"):
        psnr(torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16))
    with pytest.raises(DavaeError, match="11 x 11"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
