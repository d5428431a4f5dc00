"""diffusers' own shared model tests, applied to :class:`AutoencoderDA` over three kinds of base.

They are not part of diffusers' wheel: a checkout's ``tests`` folder is named by ``DAVAE_DIFFUSERS_TESTS``, and without
it this file skips. Run it with ``-o addopts=``: those tests bear marks of their own.
"""

import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

from davae.models import AutoencoderDA

FOLDER = Path(os.environ.get("DAVAE_DIFFUSERS_TESTS", "no checkout of diffusers"))
if not (FOLDER / "models" / "testing_utils").is_dir():
    pytest.skip("DAVAE_DIFFUSERS_TESTS names no tests folder of a checkout of diffusers", allow_module_level=True)


def _package() -> None:
    """The folder as a package of another name than ours."""
    spec = importlib.util.spec_from_file_location(
        "diffusers_tests", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None
    sys.modules["diffusers_tests"] = importlib.util.module_from_spec(spec)


_package()
shared = importlib.import_module("diffusers_tests.models.testing_utils")
of_autoencoders = importlib.import_module("diffusers_tests.models.autoencoders.testing_utils")

BASES = {
    "kl": lambda: AutoencoderKL(
        block_out_channels=[8, 16],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ),
    "dc": lambda: AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    ),
    "tiny": lambda: AutoencoderTiny(
        in_channels=3,
        out_channels=3,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    ),
}


class _Over(shared.BaseModelTesterConfig):
    base = ""
    model_class = AutoencoderDA
    main_input_name = "sample"
    output_shape = (3, 32, 32)

    def get_init_dict(self):
        vae = AutoencoderDA.from_base(BASES[self.base](), scale=2, detail_channels=8)
        known = inspect.signature(AutoencoderDA.__init__).parameters
        return {name: value for name, value in vae.config.items() if name in known}

    def get_dummy_inputs(self):
        return {"sample": torch.randn(4, 3, 32, 32, generator=torch.manual_seed(0))}


class _Shared(_Over, of_autoencoders.AutoencoderTesterMixin, shared.ModelTesterMixin, shared.TrainingTesterMixin):
    recomputed: frozenset[str] = frozenset()

    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(set(self.recomputed))


class TestOverKL(_Shared):
    base = "kl"
    recomputed = frozenset({"Encoder", "Decoder", "UNetMidBlock2D"})


class TestOverDC(_Shared):
    base = "dc"
    recomputed = frozenset({"FeatureChain"})


class TestOverTiny(_Shared):
    base = "tiny"
    recomputed = frozenset({"EncoderTiny", "DecoderTiny", "FeatureChain"})


# These need an accelerator; they stand apart because the mixin's mark would skip a whole class with it.
class TestMemoryOverKL(_Over, shared.MemoryTesterMixin):
    base = "kl"


class _NotSplit(_Over, shared.MemoryTesterMixin):
    """Over a base that itself refuses ``device_map="auto"``: its class has no ``_no_split_modules``."""

    reason = "the base's class does not support device_map='auto'"
    test_cpu_offload = pytest.mark.skip(reason=reason)(lambda self: None)
    test_disk_offload_with_safetensors = pytest.mark.skip(reason=reason)(lambda self: None)
    test_disk_offload_without_safetensors = pytest.mark.skip(reason=reason)(lambda self: None)


class TestMemoryOverDC(_NotSplit):
    base = "dc"


class TestMemoryOverTiny(_NotSplit):
    base = "tiny"

    @pytest.mark.skip(reason="all tensors have 8 bits in either case; diffusers skips it for the base")
    def test_layerwise_casting_memory(self):
        pass
