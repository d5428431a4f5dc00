"""A perceptual distance through a tiny random network: what it says of equal, blurred and noisy images."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel, ResNetConfig, ResNetModel

from davae.errors import DavaeError
from davae.models.perceptual import DinoDistance
from davae.recipes.settings import ReconstructionSettings
from davae.training.autoencoder.losses import ReconstructionLoss

_SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(scope="module", params=["dinov2", "dinov3"])
def backbone(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    if request.param == "dinov2":
        # A random one of the usual spread hardly looks at its input, and layer scale 1 makes up for it.
        network = Dinov2Model(Dinov2Config(**_SMALL, initializer_range=0.2))
    else:
        network = DINOv3ViTModel(DINOv3ViTConfig(**_SMALL, num_register_tokens=2, initializer_range=0.2))
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    broad = F.interpolate(torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1, 40, mode="bicubic")
    return (broad + 0.1 * torch.randn(4, 3, 40, 40, generator=generator)).clamp(-1, 1)


def _blurred(images, width):
    kernel = torch.ones(3, 1, width, width) / width**2
    return F.conv2d(F.pad(images, (width // 2,) * 4, mode="reflect"), kernel, groups=3)


def test_equal_images_are_at_zero_and_blur_and_noise_move_them_apart(backbone, images):
    distance = DinoDistance(backbone)
    assert distance(images, images).tolist() == [0.0] * 4
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    for worse in (
        [_blurred(images, width) for width in (3, 5, 9)],
        [images + strength * noise for strength in (0.05, 0.2, 0.8)],
    ):
        with torch.no_grad():
            means = [float(distance(images, each).mean()) for each in worse]
        assert 0 < means[0] < means[1] < means[2]


def test_one_value_an_image_whatever_the_batch(backbone, images):
    distance = DinoDistance(backbone)
    with torch.no_grad():
        whole = distance(images, images.flip(3))
        parts = [distance(a, a.flip(3)) for a in images.split(1)]
    assert whole.shape == (4,)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-8)


def test_it_is_the_mean_square_of_unit_tokens_over_layers(backbone, images):
    distance = DinoDistance(backbone)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        a, b = (
            distance.network(((x + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states
            for x in (images[:1], images[1:2])
        )
        expected = 0.0
        for x, y in zip(a[1:], b[1:], strict=True):
            x, y = x[0] / x[0].norm(dim=1, keepdim=True), y[0] / y[0].norm(dim=1, keepdim=True)
            expected += float((x - y).square().mean()) / 3
        assert float(distance(images[:1], images[1:2])) == pytest.approx(expected, rel=1e-5)


def test_it_is_the_distance_of_the_package(backbone, images):
    theirs = pytest.importorskip("dino_perceptual").DINOPerceptual(model_name=str(backbone))
    large = F.interpolate(images[:1], (520, 600), mode="bicubic").clamp(-1, 1)
    with torch.no_grad():
        for pair in ((images, images.flip(2)), (large, large.flip(3))):
            torch.testing.assert_close(DinoDistance(backbone)(*pair), theirs(*pair), rtol=1e-5, atol=1e-9)


def test_as_a_loss_it_pulls_a_picture_towards_the_image(backbone, images):
    settings = ReconstructionSettings(l1_weight=0.0, dino_weight=100.0, dino_backbone=str(backbone))
    loss = ReconstructionLoss(settings).train()
    assert not any(p.requires_grad for p in loss.parameters())
    picture = (images + 0.5).requires_grad_()
    terms = loss(images, picture)
    assert terms["reconstruction"].item() == pytest.approx(100 * terms["dino"].item())
    (gradient,) = torch.autograd.grad(terms["reconstruction"], picture)
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 0
    with torch.no_grad():
        closer = loss(images, picture - 1e-3 * gradient / gradient.norm())["dino"]
    assert closer < terms["dino"]


def test_what_is_missing_is_named_with_its_place_and_remedy(tmp_path):
    for folder in (None, tmp_path / "absent"):
        with pytest.raises(DavaeError, match="hf download") as message:
            DinoDistance(folder)
        assert str(folder) in str(message.value)
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp_path / "r")
    with pytest.raises(DavaeError, match="vision transformer"):
        DinoDistance(tmp_path / "r")
    network = Dinov2Model(Dinov2Config(**_SMALL))
    weights = {k: v for k, v in network.state_dict().items() if "layer.1.norm1" not in k}
    network.save_pretrained(tmp_path / "half", state_dict=weights)
    with pytest.raises(DavaeError, match=r"layer\.1\.norm1"):
        DinoDistance(tmp_path / "half")
    with pytest.raises(DavaeError, match=r"reconstruction\.dino_backbone"):
        ReconstructionLoss(ReconstructionSettings(dino_weight=1.0))
