"""The variational bound that trains learned variances, as in DiT and PixArt.

Source: Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", arXiv 2102.09672.

The true noise and the lowest variance give the true reverse step, whose term is zero:

    >>> alphas_cumprod = torch.linspace(0.99, 0.01, 10)
    >>> data, noise, timestep = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.tensor([5])
    >>> noisy = (1 - alphas_cumprod[5]).sqrt() * noise
    >>> lowest = -torch.ones_like(noise)
    >>> VariationalBound(alphas_cumprod)(noise, lowest, data=data, noisy=noisy, timestep=timestep).round(decimals=4)
    tensor([[[[0.]]]])
"""

import math

import torch
from torch import Tensor

from davae.errors import DavaeError


class VariationalBound:
    """One term of the bound per element, in bits; it trains the variance, on which the noise's error does not depend.

    The transformer's second half ``v`` interpolates between the extremes of the reverse step's variance (Eq. 15):
    ``log s^2 = (v + 1) / 2 log beta_t + (1 - v) / 2 log beta~_t``. The term is the KL divergence of the true reverse
    step ``q(x_{t-1} | x_t, x_0)`` from the model's, and at ``t = 0`` the negative log-likelihood of the data in bins of
    width 1 / 127.5, as for 8-bit images; DiT uses it on latents too. The mean gets no gradient: the noise's error
    trains it.

    Args:
        alphas_cumprod: cumulative products of ``1 - beta``, ``[T]``, decreasing, in (0, 1).

    Raises:
        DavaeError: they do not decrease, or reach 0 or 1, where the bound is undefined.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        alphas_cumprod = alphas_cumprod.double()
        falling = len(alphas_cumprod) > 1 and bool((alphas_cumprod.diff() < 0).all())
        if not falling or not 0 < alphas_cumprod[-1] < alphas_cumprod[0] < 1:
            raise DavaeError(
                "a learned variance needs alphas_cumprod that decrease strictly between 1 and 0, but they run "
                f"from {float(alphas_cumprod[0]):g} to {float(alphas_cumprod[-1]):g} (rescale_betas_zero_snr?)"
            )
        before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        beta = 1 - alphas_cumprod / before
        posterior = beta * (1 - before) / (1 - alphas_cumprod)
        posterior = torch.cat([posterior[1:2], posterior[1:]])  # 0 at t = 0, so replaced before the logarithm
        of_data = before.sqrt() * beta / (1 - alphas_cumprod)
        of_noisy = (1 - beta).sqrt() * (1 - before) / (1 - alphas_cumprod)
        tables = torch.stack([alphas_cumprod, of_data, of_noisy, posterior.log(), beta.log()], dim=1).float()  # [T, 5]
        self._tables = {tables.device: tables}

    def __call__(self, noise: Tensor, variance: Tensor, *, data: Tensor, noisy: Tensor, timestep: Tensor) -> Tensor:
        """The bound's terms in bits, float32 ``[B, C, h, w]``.

        Args:
            noise: predicted noise, ``[B, C, h, w]``.
            variance: ``v``, the same shape.
            data: clean latents, the same shape.
            noisy: latents at ``timestep``, the same shape.
            timestep: ``[B]``, integers in ``[0, T)``; checked on the CPU only, to avoid a synchronisation.

        Raises:
            DavaeError: a timestep outside the schedule.
        """
        steps = len(next(iter(self._tables.values())))
        if timestep.device.type == "cpu" and not ((timestep >= 0) & (timestep < steps)).all():
            raise DavaeError(f"timesteps must lie in 0 to {steps - 1}, not {timestep.tolist()}")
        noise, variance, data, noisy = (x.float() for x in (noise.detach(), variance, data, noisy))

        if data.device not in self._tables:
            self._tables[data.device] = next(iter(self._tables.values())).to(data.device)
        rows = self._tables[data.device][timestep.to(data.device)].view(-1, 5, 1, 1, 1)
        alphas_cumprod, of_data, of_noisy, low, high = rows.unbind(1)  # each [B, 1, 1, 1]
        x0_hat = (noisy - (1 - alphas_cumprod).sqrt() * noise) / alphas_cumprod.sqrt()
        mean = of_data * x0_hat + of_noisy * noisy
        true = of_data * data + of_noisy * noisy
        share = (variance + 1) / 2
        log = share * high + (1 - share) * low
        divergence = 0.5 * (log - low - 1 + (low - log).exp() + (true - mean).square() * (-log).exp())
        likelihood = -_log_likelihood(data, mean, 0.5 * log)
        first = (timestep == 0).to(data.device).view(-1, 1, 1, 1)
        return torch.where(first, likelihood, divergence) / math.log(2)


def _log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of the bin around ``x`` (1 / 127.5 wide; open at -1 and 1) under a Gaussian."""
    scale = (-log_std).exp()
    above = torch.special.ndtr((x - mean + 1 / 255) * scale)
    below = torch.special.ndtr((x - mean - 1 / 255) * scale)
    inside = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return inside.clamp(min=1e-12).log()
