"""Frozen linear layers stored in 8 or 4 bits, through diffusers' quantisation with bitsandbytes.

``from_pretrained`` of diffusers quantises a model while it reads it. A widened transformer is in memory already: its
layers are replaced one at a time, in place, by the same parts of diffusers, so that no second copy exists. The widened
layers, which learn, and the modules that the class keeps in float32 stay as they are. Adapters are attached afterwards.
"""

import logging
from typing import Any

import torch
from diffusers import BitsAndBytesConfig
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from davae.choices import Quantization
from davae.errors import DavaeError
from davae.warm_start import channel_parameters

_HOLDER = "layer"


def quantizable_layers(transformer: ModelMixin) -> list[str]:
    """Names of the linear layers that :func:`quantize` replaces."""
    widened = {name.rpartition(".")[0] for name in channel_parameters(transformer)}
    exact = set(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name not in widened and not exact & set(name.split("."))
    ]


def quantized_bytes(layer: nn.Linear, quantization: Quantization) -> int:
    """Bytes of a layer's weight, computed: LLM.int8 has a float32 scale a row, NF4 one for each 64 weights."""
    count = layer.weight.numel()
    return count + 4 * layer.out_features if quantization == "8bit" else (count + 1) // 2 + 4 * -(-count // 64)


def quantize(transformer: ModelMixin, quantization: Quantization, device: torch.device) -> None:
    """Replace the linear layers of a widened transformer without adapters, in place.

    A layer computes in bfloat16, and so do its gradients with respect to its input. In ``8bit`` (LLM.int8) a GPU also
    rounds inputs to 8 bits, except outliers above 6.

    Args:
        transformer: widened, frozen as far as it is replaced, in bfloat16.
        quantization: ``8bit`` or ``4bit`` (NF4).
        device: where the quantised layers are to be.

    Raises:
        DavaeError: bitsandbytes cannot be imported, or the transformer has no layer to replace.
    """
    key = "diffusion.tune.quantization"
    try:
        import bitsandbytes  # noqa: F401
        from diffusers.quantizers import DiffusersAutoQuantizer
        from diffusers.quantizers.bitsandbytes import replace_with_bnb_linear  # imports bitsandbytes if it is there
    except ImportError as error:
        raise DavaeError(
            f"{key}={quantization} needs bitsandbytes, which cannot be imported ({error}): "
            f"`pip install bitsandbytes`, or set {key}=none"
        ) from error
    names = quantizable_layers(transformer)
    if not names:
        raise DavaeError(
            f"{key}={quantization}: {type(transformer).__name__} has no linear layers besides the widened ones: set "
            f"{key}=none"
        )
    config = BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=False)
    # It tells of every layer in every step that LLM.int8 rounds inputs by way of float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for name in names:
        path, _, last = name.rpartition(".")
        linear: Any = transformer.get_submodule(name)
        holder: Any = nn.ModuleDict({_HOLDER: linear})  # diffusers tells layers by ends of their names: this has one
        replace_with_bnb_linear(holder, modules_to_not_convert=[], quantization_config=config)
        quantizer.create_quantized_param(holder, linear.weight.data, f"{_HOLDER}.weight", device, {})
        made = holder[_HOLDER]
        made.bias = linear.bias
        made.support_avx512bf16_for_cpu = False  # in validation it would pack weights, which then have no gradient
        made.register_forward_pre_hook(_in_bfloat16)
        setattr(transformer.get_submodule(path), last, made)
        linear.weight = None
    setattr(transformer, f"is_loaded_in_{quantization}", True)  # peft chooses its layers by it


def _in_bfloat16(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What autocast does for a plain linear layer."""
    return (inputs[0].to(torch.bfloat16), *inputs[1:])


def recompute(module: nn.Module, *inputs: Any) -> Any:
    """Gradient checkpointing of a block with 8-bit layers, for ``enable_gradient_checkpointing``.

    bitsandbytes' 8-bit product keeps its input outside of what autograd saves, where torch's usual checkpointing does
    not find it. The reentrant form makes the first pass without a graph, so that nothing is kept.
    """
    return checkpoint(module.__call__, *inputs, use_reentrant=True)
