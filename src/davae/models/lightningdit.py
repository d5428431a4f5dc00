"""LightningDiT: a class-conditional diffusion transformer for flow matching.

A DiT (Peebles and Xie 2023, arXiv 2212.09748) with the changes of Yao et al. 2025 (arXiv 2501.01423):
RMSNorm, SwiGLU, two-dimensional RoPE and optional QK-norm. The model comes first, then its parts.
"""

from typing import Any, ClassVar, TypedDict

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from davae.errors import DavaeError
from davae.models.portable import Portable

TIME_CHANNELS = 256  # width of the timestep's sinusoid


class Size(TypedDict):
    """Depth, width and heads of a named model."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int


#: Named sizes: ``LightningDiTTransformer2DModel(**SIZES["XL"], sample_size=16, ...)``. XL/1 in papers
#: is XL with patch size 1. S comes from DiT; the others are published LightningDiT configurations.
SIZES: dict[str, Size] = {
    "S": Size(num_layers=12, hidden_size=384, num_attention_heads=6),
    "B": Size(num_layers=12, hidden_size=768, num_attention_heads=12),
    "L": Size(num_layers=24, hidden_size=1024, num_attention_heads=16),
    "XL": Size(num_layers=28, hidden_size=1152, num_attention_heads=16),
    "1p0B": Size(num_layers=24, hidden_size=1536, num_attention_heads=24),
    "1p6B": Size(num_layers=28, hidden_size=1792, num_attention_heads=28),
}


class LightningDiTTransformer2DModel(Portable, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts the velocity of a latent on the straight path from noise to data.

    With ``x_t = t * data + (1 - t) * noise`` the output estimates ``data - noise``: ``t = 0`` is noise and
    ``t = 1`` data. A new model predicts zero everywhere, because its head is initialised to zero.

    Any latent size is accepted, not only `sample_size`: positions are computed, not learned.

    Args:
        sample_size: side of the latent grid the model is trained on.
        patch_size: side of a token, in latent positions.
        in_channels: latent channels in.
        out_channels: latent channels out; `in_channels` if None.
        hidden_size: width of a token; a multiple of four and of `num_attention_heads`.
        num_layers: number of blocks.
        num_attention_heads: heads per block; with RoPE their width must be a multiple of four.
        num_classes: number of labels. Label `num_classes` itself is the null label of guidance.
        qk_norm: normalise queries and keys.
        swiglu: gated feed-forward of width ``int(2/3 * 4 * hidden_size)``; else GELU of width ``4 * hidden_size``.
        rope: rotate queries and keys by position, in addition to the fixed sin-cos table.
        rms_norm: RMSNorm with a weight; else LayerNorm, without parameters on tokens.
        adaln_shift: blocks are modulated by shift, scale and gate; else by scale and gate.
        class_dropout: the probability that :meth:`drop_labels`, which training calls, replaces a label by the null
            label.

    Raises:
        DavaeError: `hidden_size` and `num_attention_heads` do not fit each other.
    """

    __module__ = "davae"  # the library by which saved pipelines know it
    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LightningDiTBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["LightningDiTBlock"]

    @register_to_config
    def __init__(
        self,
        *,  # diffusers takes positional values for defaults and loses them when it rebuilds a model
        sample_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
        num_classes: int,
        out_channels: int | None = None,
        qk_norm: bool = False,
        swiglu: bool = True,
        rope: bool = True,
        rms_norm: bool = True,
        adaln_shift: bool = True,
        class_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if hidden_size % num_attention_heads or hidden_size % 4:
            raise DavaeError(
                f"hidden_size {hidden_size} must be a multiple of num_attention_heads {num_attention_heads} and of 4"
            )
        self.head_channels = hidden_size // num_attention_heads
        if rope and self.head_channels % 4:
            raise DavaeError(
                f"rope needs heads whose width is a multiple of 4; hidden_size {hidden_size} over "
                f"{num_attention_heads} heads gives {self.head_channels}"
            )
        self.out_channels = in_channels if out_channels is None else out_channels
        self.gradient_checkpointing = False

        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.time_sinusoid = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(TIME_CHANNELS, hidden_size)
        self.class_embed = nn.Embedding(num_classes + 1, hidden_size)  # the last row is the null label
        self.transformer_blocks = nn.ModuleList(
            LightningDiTBlock(
                hidden_size,
                num_attention_heads,
                qk_norm=qk_norm,
                swiglu=swiglu,
                rms_norm=rms_norm,
                adaln_shift=adaln_shift,
            )
            for _ in range(num_layers)
        )
        self.norm_out = _token_norm(hidden_size, rms_norm)
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)  # shift, scale
        self.proj_out = nn.Linear(hidden_size, patch_size**2 * self.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        # Xavier keeps the variance of activations and gradients about equal through linear layers, of which the
        # patch convolution is one, over flattened patches.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                _zero(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        _zero(self.patch_embed.bias)
        # Small, so that conditioning is learned rather than random.
        nn.init.normal_(self.class_embed.weight, std=0.02)
        nn.init.normal_(self.time_embed.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_embed.linear_2.weight, std=0.02)
        # adaLN-zero: every gate starts at zero, so every block starts as the identity.
        modulations = [m.modulation for m in self.modules() if isinstance(m, LightningDiTBlock)]
        for modulation in [*modulations, self.modulation_out]:
            _zero(modulation.weight, modulation.bias)
        # A zero head starts from the prediction 0, the mean of data - noise for a normalised latent.
        _zero(self.proj_out.weight, self.proj_out.bias)

    @property
    def null_label(self) -> int:
        """The label for "no class"."""
        return int(self.config.num_classes)

    def embed_tokens(self, hidden_states: Tensor) -> Tensor:
        """Latent [B, C, h, w] -> tokens with their positions [B, h * w / patch_size^2, hidden_size]."""
        patches = self.patch_embed(hidden_states)  # [B, hidden, rows, columns]
        rows, columns = patches.shape[-2:]
        # In the dtype of the weights, so that under autocast the residual stream stays float32.
        dtype = self.patch_embed.weight.dtype
        table = sincos_table(rows, columns, patches.shape[1], patches.device).to(dtype)
        return patches.flatten(2).transpose(1, 2) + table

    def embed_time(self, timestep: Tensor) -> Tensor:
        """Times in [0, 1], [B] -> [B, hidden_size]. The sinusoid takes t unscaled, cosines first."""
        return self.time_embed(self.time_sinusoid(timestep).to(self.patch_embed.weight.dtype))

    def embed_class(self, class_labels: Tensor) -> Tensor:
        """Labels [B] -> [B, hidden_size]."""
        return self.class_embed(class_labels)

    def drop_labels(self, class_labels: Tensor) -> Tensor:
        """Labels [B] for a training step, of which each becomes the null label with `class_dropout`."""
        if self.config.class_dropout <= 0:
            return class_labels
        dropped = torch.rand(class_labels.shape, device=class_labels.device) < self.config.class_dropout
        return class_labels.masked_fill(dropped, self.null_label)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Velocity ``data - noise`` at time `timestep`.

        Args:
            hidden_states: noisy latent, [B, in_channels, h, w].
            timestep: time in [0, 1], 0 noise and 1 data; [B] or a scalar tensor.
            class_labels: [B] int64 in [0, num_classes], where `num_classes` is the null label.
            return_dict: return an output object with `.sample`, else a tuple of one tensor.

        Returns:
            Velocity [B, out_channels, h, w].

        Raises:
            DavaeError: the latent has another number of channels, `patch_size` does not divide its sides, or
                a label is out of range. Labels are checked on the CPU only: on an accelerator the check would
                synchronise every step, so there the pipeline and the data set check them beforehand.
        """
        self._check_inputs(hidden_states, class_labels)
        batch, _, height, width = hidden_states.shape
        p = self.config.patch_size
        rows, columns = height // p, width // p

        tokens = self.embed_tokens(hidden_states)  # [B, T, hidden]
        condition = self.embed_time(timestep.expand(batch)) + self.embed_class(class_labels)  # [B, hidden]
        condition = F.silu(condition)  # shared by all modulations
        rotation = rope_table(rows, columns, self.head_channels, tokens.device) if self.config.rope else None
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = self._gradient_checkpointing_func(block, tokens, condition, rotation)
            else:
                tokens = block(tokens, condition, rotation)

        shift, scale = self.modulation_out(condition).chunk(2, dim=1)
        patches = self.proj_out(_modulate(self.norm_out(tokens), shift, scale))  # [B, T, p * p * C]
        # A token's features are ordered (row, column, channel), channel fastest.
        patches = patches.view(batch, rows, columns, p, p, self.out_channels)
        sample = patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.out_channels, height, width)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _check_inputs(self, hidden_states: Tensor, class_labels: Tensor) -> None:
        if hidden_states.shape[1] != self.config.in_channels:
            raise DavaeError(
                f"the latent has {hidden_states.shape[1]} channels, the transformer takes {self.config.in_channels}"
            )
        height, width = hidden_states.shape[-2:]
        if height % self.config.patch_size or width % self.config.patch_size:
            raise DavaeError(
                f"a latent of {height} x {width} cannot be divided into patches of {self.config.patch_size}: "
                "both sides must be multiples of the patch size"
            )
        shapes_only = torch.compiler.is_compiling() or detect_fake_mode(()) is not None
        if class_labels.device.type == "cpu" and not shapes_only:
            wrong = class_labels[(class_labels < 0) | (class_labels > self.null_label)]
            if wrong.numel():
                raise DavaeError(
                    f"class label {int(wrong[0])} is out of range: the model knows 0 to "
                    f"{self.null_label - 1}, and {self.null_label} for no class"
                )


class LightningDiTBlock(nn.Module):
    """Attention and feed-forward, each normalised, modulated by the condition and gated (adaLN-zero)."""

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        *,
        qk_norm: bool,
        swiglu: bool,
        rms_norm: bool,
        adaln_shift: bool,
    ) -> None:
        super().__init__()
        self.adaln_shift = adaln_shift
        self.norm1 = _token_norm(hidden_size, rms_norm)
        self.attn = RotaryAttention(hidden_size, num_attention_heads, qk_norm=qk_norm, rms_norm=rms_norm)
        self.norm2 = _token_norm(hidden_size, rms_norm)
        # Two thirds of 4 * hidden, because the gate is a third matrix: as many weights as without a gate.
        self.ff = FeedForward(
            hidden_size,
            inner_dim=int(2 / 3 * 4 * hidden_size) if swiglu else 4 * hidden_size,
            activation_fn="swiglu" if swiglu else "gelu-approximate",
        )
        # (shift,) scale, gate of the attention, then of the feed-forward
        self.modulation = nn.Linear(hidden_size, (6 if adaln_shift else 4) * hidden_size)

    def forward(self, tokens: Tensor, condition: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Tokens [B, T, hidden], condition after SiLU [B, hidden], RoPE's cosine and sine -> tokens."""
        parts = self.modulation(condition).chunk(6 if self.adaln_shift else 4, dim=1)
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            parts if self.adaln_shift else (None, *parts[:2], None, *parts[2:])
        )
        tokens = tokens + gate1[:, None] * self.attn(_modulate(self.norm1(tokens), shift1, scale1), rotation)
        return tokens + gate2[:, None] * self.ff(_modulate(self.norm2(tokens), shift2, scale2))


class RotaryAttention(nn.Module):
    """Self-attention over all tokens with optional QK-norm and RoPE.

    Its layers have the names of diffusers' attention, so that the same LoRA targets apply.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool, rms_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size)])
        head_channels = hidden_size // num_heads
        self.norm_q = _head_norm(head_channels, rms_norm) if qk_norm else nn.Identity()
        self.norm_k = _head_norm(head_channels, rms_norm) if qk_norm else nn.Identity()

    def forward(self, tokens: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """[B, T, hidden] -> [B, T, hidden]."""
        split = (self.num_heads, -1)
        query = self.norm_q(self.to_q(tokens).unflatten(-1, split).transpose(1, 2))  # [B, heads, T, head]
        key = self.norm_k(self.to_k(tokens).unflatten(-1, split).transpose(1, 2))
        value = self.to_v(tokens).unflatten(-1, split).transpose(1, 2)
        if rotation is not None:
            query, key = apply_rope(query, *rotation), apply_rope(key, *rotation)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.to_out[0](attended.transpose(1, 2).flatten(2))


class RMSNorm(nn.RMSNorm):
    """RMSNorm that keeps torch's fused kernel under autocast, where the weight has a wider dtype than the input."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., channels] -> [..., channels]."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def _token_norm(channels: int, rms_norm: bool) -> nn.Module:
    # Before a modulation LayerNorm needs no parameters; RMSNorm has a weight, as in the published models.
    if rms_norm:
        return RMSNorm(channels, eps=1e-6)
    return nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)


def _head_norm(channels: int, rms_norm: bool) -> nn.Module:
    return RMSNorm(channels, eps=1e-6) if rms_norm else nn.LayerNorm(channels)


def _zero(*parameters: Tensor | None) -> None:
    for parameter in parameters:
        if parameter is not None:
            nn.init.zeros_(parameter)


def _modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    # x (1 + scale) + shift, one shift and scale per sample: [B, T, hidden], [B, hidden]
    x = x * (1 + scale[:, None])
    return x if shift is None else x + shift[:, None]


def grid_positions(height: int, width: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Row and column of every token in reading order: two float32 tensors [height * width]."""
    rows = torch.arange(height, dtype=torch.float32, device=device)
    columns = torch.arange(width, dtype=torch.float32, device=device)
    return rows.repeat_interleave(width), columns.repeat(height)


def _angles(position: Tensor, count: int) -> Tensor:
    """``position * 10000^(-i / count)`` for i < count: [N] -> [N, count]."""
    exponent = torch.arange(count, dtype=torch.float32, device=position.device) / count
    return position[:, None] * 10000.0**-exponent


def sincos_table(height: int, width: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Fixed position table [height * width, channels], float32.

    The first half of the channels encodes the column, the second the row; each half is all sines, then all
    cosines, of the ``n = channels / 4`` frequencies ``10000^(-i / n)``. `channels` must be a multiple of four.
    """
    row, column = grid_positions(height, width, device)
    column_angle, row_angle = _angles(column, channels // 4), _angles(row, channels // 4)
    return torch.cat([column_angle.sin(), column_angle.cos(), row_angle.sin(), row_angle.cos()], dim=1)


def rope_table(
    height: int, width: int, head_channels: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation angles, each [height * width, head_channels / 2], float32.

    The first half of a head's channel pairs rotates with the row, the second with the column, each with the
    ``n = head_channels / 4`` frequencies ``10000^(-i / n)``. `head_channels` must be a multiple of four.
    """
    row, column = grid_positions(height, width, device)
    angle = torch.cat([_angles(row, head_channels // 4), _angles(column, head_channels // 4)], dim=1)
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of every token by its angles; keeps the dtype of `x`.

    The product of a rotated query and a rotated key depends on their positions only through the difference:
    (R(p) q) . (R(p') k) = q . R(p' - p) k   (Su et al. 2021, arXiv 2104.09864).

    Args:
        x: queries or keys, [B, heads, tokens, head_channels].
        cos: from :func:`rope_table`, [tokens, head_channels / 2].
        sin: the same.
    """
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)  # [B, heads, tokens, head_channels / 2] each
    rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def restarted(
    model: LightningDiTTransformer2DModel,
    *,
    sample_size: int | None = None,
    patch_size: int | None = None,
    qk_norm: bool | None = None,
) -> LightningDiTTransformer2DModel:
    """A new model with the weights of ``model`` and other options; options that are None stay as they are.

    New QK-norms (weight 1) and larger patches change the function: the weights are an initialisation. A patch larger by
    a factor k embeds the mean of the old patches inside it, ``W' = W / k^2`` at each of the ``k x k`` places, and the
    head predicts the old head's output at every place.

    Args:
        model: left unchanged.
        sample_size: side of the latent that the new model will be trained on; any is accepted.
        patch_size: a multiple of the old one.
        qk_norm: normalise queries and keys.

    Raises:
        DavaeError: not a LightningDiT, a patch size that is not a multiple of the old one, or QK-norm removed.
    """
    if not isinstance(model, LightningDiTTransformer2DModel):
        raise DavaeError(f"only a LightningDiT can be restarted with other options, not a {type(model).__name__}")
    changes: dict[str, Any] = {"sample_size": sample_size, "patch_size": patch_size, "qk_norm": qk_norm}
    arguments = {name: value for name, value in model.config.items() if not name.startswith("_")}
    arguments |= {name: value for name, value in changes.items() if value is not None}
    factor, rest = divmod(arguments["patch_size"], model.config.patch_size)
    if rest or factor < 1:
        raise DavaeError(f"patch_size {arguments['patch_size']} is no multiple of the base's {model.config.patch_size}")
    if model.config.qk_norm and not arguments["qk_norm"]:
        raise DavaeError("the base was trained with QK-norm, which cannot be removed: leave qk_norm as it is")
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
