"""A LightningDiT that starts from another one with other options: QK-norm put in, or another patch size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.models.lightningdit import LightningDiTTransformer2DModel


def restarted(
    model: LightningDiTTransformer2DModel,
    *,
    sample_size: int | None = None,
    patch_size: int | None = None,
    qk_norm: bool | None = None,
) -> LightningDiTTransformer2DModel:
    """A new model with the weights of ``model`` and other options; what is not given stays.

    Neither change keeps the function exactly, the weights are a start. New norms of queries and keys have weight 1. A
    larger patch sees the mean of the old tokens inside it, ``W' = W / k^2`` at each of the ``k x k`` places, and
    its head gives to each place what the old head gave.

    Args:
        model: is not changed.
        sample_size: side of the latent that it will be trained on; positions are computed for any.
        patch_size: a multiple of the old one.
        qk_norm: normalise queries and keys.

    Raises:
        DavaeError: not a LightningDiT, a patch size that is no multiple of the old one, or QK-norm taken out.
    """
    if not isinstance(model, LightningDiTTransformer2DModel):
        raise DavaeError(f"only LightningDiT can be started with other options, not {type(model).__name__}")
    changes: dict[str, Any] = {"sample_size": sample_size, "patch_size": patch_size, "qk_norm": qk_norm}
    arguments = {name: value for name, value in model.config.items() if not name.startswith("_")}
    arguments |= {name: value for name, value in changes.items() if value is not None}
    factor, rest = divmod(arguments["patch_size"], model.config.patch_size)
    if rest or factor < 1:
        raise DavaeError(
            f"patch_size {arguments['patch_size']} is no multiple of the base's {model.config.patch_size}"
        )
    if model.config.qk_norm and not arguments["qk_norm"]:
        raise DavaeError(
            "the base was trained with QK-norm, which cannot be taken out: leave qk_norm as it is"
        )
    weights = model.state_dict()
    if factor > 1:
        weights = _larger_patches(weights, factor, model.config.patch_size)
    with torch.device(next(model.parameters()).device):
        made = LightningDiTTransformer2DModel(**arguments)
    fresh = made.state_dict()
    norms = (".attn.norm_q.", ".attn.norm_k.")
    for name in fresh.keys() - weights.keys():
        assert any(norm in name for norm in norms), name
        weights[name] = fresh[name]
    made.load_state_dict({name: weights[name] for name in fresh}, strict=True)
    nn.Module.to(made, model.dtype)
    return made.train(model.training)


def _larger_patches(weights: dict[str, Tensor], factor: int, patch: int) -> dict[str, Tensor]:
    places = factor**2
    embed, head = weights["patch_embed.weight"], "proj_out."
    changed = {"patch_embed.weight": embed.repeat(1, 1, factor, factor) / places}
    for name in (f"{head}weight", f"{head}bias"):
        old = weights[name].unflatten(0, (patch, patch, -1))  # [p, p, C, ...], the channel fastest
        tiled = old.repeat(factor, factor, *[1] * (old.ndim - 2))
        changed[name] = tiled.flatten(0, 2)
    return {**weights, **changed}
