from __future__ import annotations

import pytest
import torch
from torch import Tensor

from davae.diffusion import FlowLoss, cosine_loss, min_snr_weight, structured_loss
from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.latents.prefixes import prefix_mask

LAYOUT = LatentLayout(1, 3)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def errors(base: float, detail: float) -> tuple[Tensor, Tensor]:
    """A prediction whose base channel is off by `base` and whose three detail channels by `detail`."""
    target = draw(1, 4, 2, 2)
    offset = torch.tensor([base, detail, detail, detail]).reshape(1, 4, 1, 1)
    return target + offset, target


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (0.0, 4.0),  # base alone: 2^2
        (0.5, (4 * 4 + 0.5 * 12 * 1) / (4 + 0.5 * 12)),  # 2.2
        (1.0, (4 * 4 + 12 * 1) / 16),  # the plain mean
        (2.0, (4 * 4 + 2 * 12 * 1) / (4 + 2 * 12)),
    ],
)
def test_equation_13(weight: float, expected: float) -> None:
    loss = structured_loss(*errors(base=2.0, detail=1.0), LAYOUT, weight)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_weight_one_is_the_mean_squared_error() -> None:
    a, b = draw(3, 4, 5, 6), draw(3, 4, 5, 6, seed=1)
    torch.testing.assert_close(structured_loss(a, b, LAYOUT, 1.0), (a - b).square().mean())


def test_equal_errors_give_the_same_loss_at_every_weight() -> None:
    losses = [structured_loss(*errors(1.5, 1.5), LAYOUT, w).item() for w in (0.0, 0.1, 1.0, 7.0)]
    assert losses == pytest.approx([2.25] * 4, rel=1e-6)


def test_each_sample_has_its_own_loss() -> None:
    a, b = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1)
    each = structured_loss(a, b, LAYOUT, 0.3, reduction="none")
    alone = [structured_loss(a[i : i + 1], b[i : i + 1], LAYOUT, 0.3) for i in range(3)]
    torch.testing.assert_close(each, torch.stack(alone))
    torch.testing.assert_close(structured_loss(a, b, LAYOUT, 0.3), each.mean())


def test_gradient_of_silent_details_is_zero() -> None:
    a = draw(2, 4, 2, 2).requires_grad_()
    structured_loss(a, draw(2, 4, 2, 2, seed=1), LAYOUT, 0.0).backward()
    assert a.grad[:, LAYOUT.detail].count_nonzero() == 0
    assert a.grad[:, LAYOUT.base].abs().min() > 0


def test_float32_whatever_the_prediction() -> None:
    a, b = draw(2, 4, 8, 8).bfloat16(), draw(2, 4, 8, 8, seed=1).bfloat16()
    loss = structured_loss(a, b, LAYOUT, 0.5)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, structured_loss(a.float(), b.float(), LAYOUT, 0.5), rtol=0, atol=0)


def test_cosine_loss() -> None:
    a = draw(2, 4, 3, 3)
    assert cosine_loss(a, 3 * a).item() == pytest.approx(0, abs=1e-6)
    assert cosine_loss(a, -a).item() == pytest.approx(2, abs=1e-6)
    x, y = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    x[0, 0], y[0, 0, 0, 0], y[0, 1, 0, 1] = 1, 1, 1  # parallel at one position, orthogonal at the other
    assert cosine_loss(x, y).item() == pytest.approx(0.5)


def test_min_snr_weight() -> None:
    weights = min_snr_weight(torch.tensor([0.0, 0.1, 1 / 6, 0.5, 1.0]), 5.0)
    torch.testing.assert_close(weights, torch.tensor([5.0, 5.0, 5.0, 1.0, 0.0]))


class TestFlowLoss:
    data, noise = draw(3, 4, 2, 2, seed=2), draw(3, 4, 2, 2, seed=3)
    sigma = torch.tensor([0.2, 0.5, 0.9])
    velocity = draw(3, 4, 2, 2, seed=4)

    def loss(self, weight: float = 0.4, velocity: Tensor | None = None, **options: object) -> Tensor:
        return FlowLoss(LAYOUT, **options)(
            self.velocity if velocity is None else velocity,
            data=self.data,
            noise=self.noise,
            sigma=self.sigma,
            weight=weight,
            reduction="none",
        )

    @pytest.mark.parametrize(
        "options", [{}, {"form": "x0"}, {"form": "x0", "min_snr_gamma": 5.0}, {"cosine_weight": 1.0}]
    )
    def test_the_true_velocity_has_no_loss(self, options: dict) -> None:
        assert self.loss(velocity=self.noise - self.data, **options).abs().max() < 1e-6

    def test_the_data_form_is_sigma_squared_times_the_velocity_form(self) -> None:
        torch.testing.assert_close(self.loss(form="x0"), self.sigma**2 * self.loss())

    def test_min_snr(self) -> None:
        weight = torch.tensor([4.0, 1.0, 1 / 9])
        torch.testing.assert_close(self.loss(min_snr_gamma=5.0), weight * self.loss())

    def test_min_snr_with_a_truncated_time(self) -> None:
        loss = FlowLoss(LAYOUT, min_snr_gamma=5.0)
        arguments = {"data": self.data, "noise": self.noise, "sigma": self.sigma, "weight": 1.0}
        plain = FlowLoss(LAYOUT)(self.velocity, **arguments, reduction="none")
        timed = loss(self.velocity, **arguments, noise_share=torch.full((3,), 0.25), reduction="none")
        torch.testing.assert_close(timed, 3 * plain)

    def test_cosine_term_sees_details_that_the_schedule_silences(self) -> None:
        velocity = self.velocity.clone().requires_grad_()
        self.loss(weight=0.0, velocity=velocity, cosine_weight=1.0).sum().backward()
        assert velocity.grad[:, LAYOUT.detail].abs().min() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: structured_loss(draw(1, 4, 2, 2), draw(1, 4, 2, 3), LAYOUT, 1.0),
            r"\(1, 4, 2, 2\).*\(1, 4, 2, 3\)",
        ),
        (lambda: structured_loss(draw(1, 5, 2, 2), draw(1, 5, 2, 2), LAYOUT, 1.0), "5 channels, expected 4"),
        (lambda: structured_loss(draw(1, 4, 2, 2), draw(1, 4, 2, 2), LAYOUT, -0.1), "negative, got -0.1"),
        (lambda: FlowLoss(LAYOUT, form="v"), "'v': use velocity or x0"),
        (lambda: FlowLoss(LAYOUT, cosine_weight=-1), "cosine_weight"),
        (lambda: min_snr_weight(torch.ones(1), 0.0), "gamma must be positive"),
    ],
)
def test_refusals(make, message: str) -> None:
    with pytest.raises(DavaeError, match=message):
        make()


def test_of_a_prefix_only_its_channels_count() -> None:
    """One base channel off by 2 and the first of three details by 1, at half weight: (4 + 0.5) / (1 + 0.5). The second
    sample keeps the base channel alone, the third everything.
    """
    target = draw(3, 4, 2, 2)
    prediction = target + torch.tensor([2.0, 1.0, 5.0, 7.0]).view(1, 4, 1, 1)
    kept = prefix_mask(torch.tensor([2, 1, 4]), 4)
    each = structured_loss(prediction, target, LAYOUT, 0.5, kept=kept, reduction="none")
    assert each.tolist() == pytest.approx([3.0, 4.0, (4 + 0.5 * (1 + 25 + 49)) / 2.5])
    whole = structured_loss(prediction, target, LAYOUT, 0.5, reduction="none")
    assert float(each[2]) == pytest.approx(float(whole[2]))


def test_a_prefix_of_base_channels_is_a_base_loss_at_any_weight() -> None:
    a, b, kept = draw(2, 4, 2, 2), draw(2, 4, 2, 2, seed=1), prefix_mask(torch.tensor([1, 1]), 4)
    for weight in (0.0, 0.5, 1.0):
        loss = structured_loss(a, b, LAYOUT, weight, kept=kept)
        assert float(loss) == pytest.approx(float((a - b)[:, :1].square().mean()))
