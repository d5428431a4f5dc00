"""What is switched on for speed changes images by rounding alone, and waits for no value on the device."""

import copy
import weakref

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import davae
from davae.bases.debug_pipelines import call_arguments, small_pipeline
from davae.bases.tiny import debug_base
from davae.errors import DavaeError
from davae.models.base_adapters.blocks import MemoryEfficientResnetBlock2D, PhasedUpsample2D
from davae.pipelines.sampling.speed import compile_regions, decode_in, regions, set_attention, speed_up


def _upgraded(name):
    pipe = small_pipeline(name)
    vae = davae.AutoencoderDA.from_base(pipe.vae, scale=2, detail_channels=4)
    return davae.upgrade_pipeline(pipe, vae)


def _image(pipe, name):
    generator = torch.Generator().manual_seed(3)
    return pipe(**call_arguments(name, scale=2), generator=generator).images


@pytest.mark.parametrize("name", ["sd3", "sana"])
def test_a_faster_pipeline_makes_the_same_image(name):
    pipe = _upgraded(name)
    before = _image(pipe, name)
    assert speed_up(pipe, attention="native") is pipe
    torch.testing.assert_close(_image(pipe, name), before, atol=1e-4, rtol=0)
    if name == "sd3":
        assert any(
            m.weight.is_contiguous(memory_format=torch.channels_last) and not m.weight.is_contiguous()
            for m in pipe.vae.modules()
            if isinstance(m, nn.Conv2d)
        )
        assert pipe.vae.use_slicing


def test_decoding_in_bfloat16_is_near_and_comes_back_in_the_own_precision():
    pipe = _upgraded("sd3")
    latent = torch.randn(2, pipe.vae.layout.channels, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = pipe.vae.decode(latent).sample
        for _ in range(2):  # switching it on again changes nothing
            speed_up(pipe, decode_dtype="bfloat16")
        near = pipe.vae.decode(latent).sample
        (again,) = pipe.vae.decode(latent, return_dict=False)
    assert near.dtype == exact.dtype == torch.float32
    assert torch.equal(near, again)
    difference = (near - exact).abs().max() / exact.abs().max()
    assert 0 < difference < 0.03
    speed_up(pipe, decode_dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(pipe.vae.decode(latent).sample, exact, atol=1e-5, rtol=1e-5)


def test_decoding_in_float32_is_exact_where_the_weights_are_half():
    """On a CPU too, where autocast knows no float32."""
    vae = _upgraded("sd3").vae.to(torch.bfloat16)
    latent = torch.randn(1, vae.layout.channels, 4, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = copy.deepcopy(vae).float().decode(latent.float()).sample
        assert not torch.equal(vae.decode(latent).sample, exact.bfloat16())
        decode_in(vae, torch.float32)
        assert torch.equal(vae.decode(latent).sample, exact.bfloat16())
    assert vae.dtype == torch.bfloat16


def test_an_attention_that_would_not_be_used_is_refused():
    """Some classes of diffusers call torch's attention and never ask the dispatcher."""
    with pytest.raises(DavaeError, match="SD3Transformer2DModel does not use diffusers' attention dispatcher"):
        set_attention(small_pipeline("sd3").transformer, "_native_math")
    transformer = small_pipeline("flux").transformer
    set_attention(transformer, "_native_math")
    assert any(
        getattr(m.processor, "_attention_backend", None) for m in transformer.modules() if hasattr(m, "processor")
    )
    transformer.set_attention_backend("native")  # diffusers keeps the choice for all models


def test_compiled_regions_are_the_repeated_ones_and_give_the_same(monkeypatch):
    """Compiled for real only where a test asks for it: here the calls are recorded and run as they are."""
    pipe = _upgraded("sd3")
    before = _image(pipe, "sd3")
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(self))
    speed_up(pipe, compile=True)
    blocks = list(pipe.transformer.transformer_blocks)
    assert compiled[: len(blocks)] == blocks
    stages = [*pipe.vae.joint_decoder.up_blocks, pipe.vae.joint_decoder.mid_block]
    assert all(stage in compiled for stage in stages)
    assert len(set(map(id, compiled))) == len(compiled)
    inside = [m for region in compiled for m in region.modules() if m is not region]
    assert not any(region is m for region in compiled for m in inside)
    torch.testing.assert_close(_image(pipe, "sd3"), before, atol=1e-4, rtol=0)


def test_only_models_are_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(self))
    transformer = debug_base().transformer
    assert compile_regions(nn.ModuleList([nn.Linear(2, 2), transformer])) == 2
    assert compiled == list(transformer.transformer_blocks)
    assert compile_regions(nn.Linear(2, 2)) == 0


def test_a_compiled_block_computes_the_same():
    transformer = debug_base().transformer
    latent, label = torch.randn(2, 4, 4, 4), torch.tensor([0, 1])
    with torch.no_grad():
        before = transformer(latent, torch.tensor([0.3, 0.6]), label).sample
        assert compile_regions(transformer) == 2
        for block in regions(transformer):
            block.compile(backend="eager")  # traced, without the minute of compiling
        after = transformer(latent, torch.tensor([0.3, 0.6]), label).sample
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_mistakes_are_told():
    pipe = debug_base()
    with pytest.raises(DavaeError, match="decode_dtype must be auto, float32"):
        speed_up(pipe, decode_dtype="int8")
    with pytest.raises(DavaeError, match="attention 'quick'"):
        speed_up(_upgraded("sd3"), attention="quick")


@pytest.mark.parametrize(("channels", "out"), [(8, 8), (8, 16)])
def test_a_frugal_block_is_bit_equal_and_trains(channels, out):
    torch.manual_seed(0)
    block = ResnetBlock2D(
        in_channels=channels, out_channels=out, temb_channels=None, groups=4, output_scale_factor=2.0
    ).eval()
    x = torch.randn(2, channels, 5, 5)
    kept = x.clone()
    expected = block(x, None)
    block.__class__ = MemoryEfficientResnetBlock2D
    with torch.no_grad():
        assert torch.equal(block(x, None), expected)
    assert torch.equal(x, kept)
    x.requires_grad_(True)
    assert torch.equal(block(x, None), expected)
    block.__class__ = ResnetBlock2D
    wanted = torch.autograd.grad(block(x, None).square().sum(), [x, *block.parameters()])
    block.__class__ = MemoryEfficientResnetBlock2D
    found = torch.autograd.grad(block(x, None).square().sum(), [x, *block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_frugal_block_keeps_the_inputs_of_its_norms_alone():
    block = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=None, groups=4)
    x = torch.randn(1, 8, 32, 32, requires_grad=True)
    calls = []
    for conv in (block.conv1, block.conv2):
        conv.register_forward_hook(lambda *_: calls.append(1))
    peaks = {}
    for kind in (ResnetBlock2D, MemoryEfficientResnetBlock2D):
        block.__class__ = kind
        with _Stored() as stored:
            y = block(x, None)
        peaks[kind] = stored.alive()
        calls.clear()
        y.sum().backward()
        assert calls == []  # a hook runs after its convolution, which is not computed again
    image = x.numel() * 4
    assert peaks[ResnetBlock2D] >= 6 * image
    assert peaks[MemoryEfficientResnetBlock2D] < 3 * image  # the first convolution's result and the block's own


class _Stored(TorchDispatchMode):
    """Follows the storages that operators make."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.seen.setdefault(storage._cdata, (weakref.ref(storage), storage.nbytes()))
        return result

    def alive(self):
        return sum(size for storage, size in self.seen.values() if storage() is not None)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_doubling_in_phases_is_doubling_and_convolving(order):
    torch.manual_seed(0)
    layer = Upsample2D(6, use_conv=True, out_channels=4).to(memory_format=order)
    x = torch.randn(2, 6, 5, 7).contiguous(memory_format=order).requires_grad_()
    there = torch.randn(2, 4, 10, 14)
    wanted = layer(x)
    gradients = torch.autograd.grad(wanted, [x, *layer.parameters()], there)
    layer.__class__ = PhasedUpsample2D
    made = layer(x)
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)
    assert made.is_contiguous(memory_format=order)
    for one, other in zip(torch.autograd.grad(made, [x, *layer.parameters()], there), gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(layer(x), wanted)


class _Reads(TorchDispatchMode):
    """Counts values that are read back from a tensor: on a GPU each waits for all that was asked for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _reads(call):
    with _Reads() as reads:
        call()
    return reads.count


def test_the_class_conditional_sampler_reads_nothing_back_in_a_step():
    pipe = debug_base()
    pipe.set_progress_bar_config(disable=True)
    reads = [_reads(lambda n=n: pipe([0], num_inference_steps=n, output_type="latent")) for n in (2, 6)]
    on_cpu_alone = 1  # a step: LightningDiT checks labels where that is free, on a CPU
    assert reads[1] - reads[0] <= 4 * on_cpu_alone
