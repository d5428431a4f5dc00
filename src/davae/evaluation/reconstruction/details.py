"""What the details contribute to reconstructions: the same base latents decoded with other details than their own."""

from collections.abc import Iterator

import torch
from torch import Tensor

from davae.models import AutoencoderDA

SHUFFLED, DRAWN = "details shuffled", "details drawn"
MEANING = {
    SHUFFLED: "the base latent with the details of the image before it; the first image has those of the last",
    DRAWN: "the base latent with details drawn from a normal distribution of each channel's mean and deviation",
}


class OtherDetails:
    """Reconstructions with other details, of images that come in batches; they do not depend on the batches.

    Args:
        vae: in evaluation mode.
        seed: of the drawn details; image ``i`` draws from ``seed + i``.
    """

    def __init__(self, vae: AutoencoderDA, seed: int = 0) -> None:
        self.vae, self.seed, self.count = vae, seed, 0
        self._first: tuple[Tensor, Tensor] | None = None  # image and base latent
        self._last: Tensor | None = None  # details

    def of(self, images: Tensor) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Pairs of images and their reconstructions by name, of the next images ``[B, 3, H, W]`` in [-1, 1]."""
        x = images.to(self.vae.device, self.vae.dtype)
        z, z_d = self.vae.encode_base(x), self.vae.encode_details(x).mean
        yield images, {DRAWN: self._decode(z, self._drawn(z_d))}
        if self._first is None or self._last is None:
            self._first = images[:1], z[:1]
            if len(images) > 1:
                yield images[1:], {SHUFFLED: self._decode(z[1:], z_d[:-1])}
        else:
            yield images, {SHUFFLED: self._decode(z, torch.cat([self._last, z_d[:-1]]))}
        self._last, self.count = z_d[-1:], self.count + len(images)

    def rest(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The first image with the details of the last, once all images have come; nothing if it is the only one."""
        if self._first is not None and self._last is not None and self.count > 1:
            image, z = self._first
            yield image, {SHUFFLED: self._decode(z, self._last)}

    def _drawn(self, z_d: Tensor) -> Tensor:
        mean, std = (values[:, None, None].to(z_d) for values in self.vae.detail_statistics())
        generators = (torch.Generator().manual_seed(self.seed + self.count + i) for i in range(len(z_d)))
        noise = torch.stack([torch.randn(z_d.shape[1:], generator=generator) for generator in generators])
        return mean + std * noise.to(z_d)

    def _decode(self, z: Tensor, z_d: Tensor) -> Tensor:
        return self.vae.decode_structured(z, z_d).float().clamp(-1, 1).cpu()
