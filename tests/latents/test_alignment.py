from __future__ import annotations

import pytest
import torch

from davae.errors import DavaeError
from davae.latents import AlignmentLoss, LatentLayout, adaptive_weight, grouped_mean, self_similarity


def channels(*values: float) -> torch.Tensor:
    """A latent of one position whose channels have these values."""
    return torch.tensor(values, dtype=torch.float32)[None, :, None, None]


def test_grouped_mean_averages_consecutive_channels() -> None:
    assert torch.equal(grouped_mean(channels(1, 2, 3, 10, 20, 30), 2), channels(2, 20))
    assert torch.equal(grouped_mean(channels(5, 7), 2), channels(5, 7))


def test_uneven_groups_round_halves_to_even_and_empty_ones_are_zero() -> None:
    # edges round(0, 2.5, 5, 7.5, 10) = 0, 2, 5, 8, 10
    assert torch.equal(grouped_mean(channels(*range(10)), 4), channels(0.5, 3, 6, 8.5))
    # edges round(0, 0.5, 1, 1.5, 2) = 0, 0, 1, 2, 2
    assert torch.equal(grouped_mean(channels(3, 4), 4), channels(0, 3, 4, 0))


def test_mean_form_by_hand() -> None:
    loss = AlignmentLoss(LatentLayout(2, 4))
    assert loss(channels(0, 2, 5, 5), channels(3, 5)) == pytest.approx((2**2 + 0) / 2)
    assert not list(loss.parameters())


@pytest.mark.parametrize("form", ["mean", "relational", "projection"])
def test_every_form_is_zero_when_aligned_float32_and_pulls_the_details(form: str) -> None:
    layout = LatentLayout(4, 8)
    loss = AlignmentLoss(layout, form)  # type: ignore[arg-type]
    z = torch.randn(2, 4, 3, 5)
    aligned = z.repeat_interleave(2, dim=1)
    assert loss(aligned, z) < 1e-10
    z_d = torch.randn(2, 8, 3, 5, requires_grad=True)
    value = loss(z_d, z)
    value.backward()
    assert value > 1e-2
    assert z_d.grad is not None
    assert z_d.grad.abs().max() > 0
    assert loss(z_d.bfloat16(), z.bfloat16()).dtype == torch.float32
    with pytest.raises(DavaeError, match="detail latent has 4 channels, expected 8"):
        loss(z, z)


def test_projection_starts_as_the_grouped_mean_and_learns() -> None:
    layout = LatentLayout(3, 7)  # uneven groups
    z, z_d = torch.randn(2, 3, 4, 4), torch.randn(2, 7, 4, 4)
    projection = AlignmentLoss(layout, "projection")
    torch.testing.assert_close(projection(z_d, z), AlignmentLoss(layout)(z_d, z))
    projection(z_d, z).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in projection.parameters())


def test_relational_form_ignores_rotation_and_length_of_the_vectors() -> None:
    z = torch.randn(1, 4, 3, 3)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    z_d = 3.0 * torch.einsum("oc,bchw->bohw", rotation[:, :4], z)
    assert AlignmentLoss(LatentLayout(4, 8), "relational")(z_d, z) < 1e-10
    assert torch.allclose(self_similarity(z).diagonal(dim1=1, dim2=2), torch.ones(1, 9))


def test_unknown_form() -> None:
    with pytest.raises(DavaeError, match=r"unknown alignment form 'cosine': use mean, relational or projection"):
        AlignmentLoss(LatentLayout(2, 2), "cosine")  # type: ignore[arg-type]


def test_adaptive_weight_is_the_clamped_ratio_of_gradient_norms() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    reference, loss = (weight * torch.tensor([3.0, 4.0])).sum(), 2.0 * weight[0]  # norms 5 and 2
    ratio = adaptive_weight(reference, loss, weight, maximum=1e4)
    assert ratio == pytest.approx(5 / (2 + 1e-4))
    assert not ratio.requires_grad
    assert adaptive_weight(reference, loss, weight, maximum=1.5) == 1.5
    assert adaptive_weight(reference, 0 * loss, weight, maximum=1e8) == pytest.approx(5e4)
    (reference + ratio * loss).backward()  # the graph is still there
    assert weight.grad is not None
