import pytest
import torch

from davae.runtime.pixel_budget import images_together, in_parts


@pytest.mark.parametrize(
    ("side", "together"), [(2048, 1), (1025, 1), (1024, 1), (512, 4), (256, 16), (128, 32), (8, 32)]
)
def test_a_megapixel_at_a_time(side: int, together: int) -> None:
    assert images_together(side, side) == together


def test_parts_hold_every_image_once_in_order_and_latents_count_as_their_images() -> None:
    images = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 3, 512, 512)
    parts = in_parts(images)
    assert [len(part) for part in parts] == [4, 1]
    assert torch.equal(torch.cat(parts), images)
    assert [len(part) for part in in_parts(images[:, :, :64, :64], compression=16)] == [1] * 5
