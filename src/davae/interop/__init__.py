"""Converts the weights published by the authors of DA-VAE and LightningDiT to davae's models, and to files for ComfyUI.

* :mod:`~davae.interop.conversion`: from a published file to a diffusers folder, as in ``davae convert``.
* :mod:`~davae.interop.official_vavae`: ``convert_vavae`` gives an ``AutoencoderKL``.
* :mod:`~davae.interop.official_autoencoders`: ``convert_imagenet`` and ``convert_sd3`` give an ``AutoencoderDA``.
* :mod:`~davae.interop.official_lightningdit`: ``load`` gives a ``LightningDiTTransformer2DModel``.
* :mod:`~davae.interop.official_sd3_transformer`: ``load_transformer`` gives a widened ``SD3Transformer2DModel``;
  latents in the authors' detail-first order are reordered by ``from_official_order``.
* :mod:`~davae.interop.sd3_transformer_files`: ``convert_transformer`` reads every form in which the authors save it.
* :mod:`~davae.interop.comfyui`: single files for ComfyUI, and back.
* :mod:`~davae.runtime.weight_files`: safetensors, and ``.pt`` or ``.ckpt`` through ``weights_only=True``.

Every key is accounted for; a missing or unknown key is an error that names it.
"""
