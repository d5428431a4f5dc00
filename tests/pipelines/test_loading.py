"""Nothing opens with a weight missing, left over, misshapen or not finite, or with statistics that cannot be ones."""

from __future__ import annotations

import ast
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoModel, DiffusionPipeline
from safetensors.torch import load_file, save_file
from tests.pipelines.parts import upgraded

import davae
from davae import AutoencoderDA
from davae.bases.debug_pipelines import SMALL_PIPELINES, call_arguments, small_pipeline
from davae.bases.open import load_base
from davae.bases.tiny import debug_base
from davae.errors import DavaeError
from davae.interop.checking import check_keys
from davae.interop.conversion import read_statistics
from davae.models.base_adapters.image import LDMAutoencoderKL
from davae.models.dc_ae import PlainAutoencoderDC
from davae.models.latent_space import open_autoencoder
from davae.pipelines import load_pipeline
from davae.pipelines.saving.adapters import LAYERS_FILE, load_adapters, save_adapters
from davae.pipelines.saving.opening import load_autoencoder
from davae.runtime import model_files
from davae.runtime.model_files import chosen_variant, not_finite, variant_of
from davae.training.dc_ae.train import load_autoencoder as load_dc_ae


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every small base, and upgraded pipelines, under their names."""
    folder = tmp_path_factory.mktemp("saved")
    for name in SMALL_PIPELINES:
        small_pipeline(name).save_pretrained(folder / name)
    for name, base in (("up-sd3", small_pipeline("sd3")), ("up-classes", debug_base())):
        upgraded(base, detail_channels=16).save_pretrained(folder / name)
    return folder


def _rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _middle(tensors: dict[str, torch.Tensor]) -> str:
    floating = sorted(key for key in tensors if tensors[key].is_floating_point() and tensors[key].ndim > 1)
    return floating[len(floating) // 2]


def _take(tensors: dict[str, torch.Tensor]) -> str:
    del tensors[(key := _middle(tensors))]
    return key


def _add(tensors: dict[str, torch.Tensor]) -> str:
    tensors["surplus.weight"] = torch.zeros(3)
    return "surplus.weight"


def _stretch(tensors: dict[str, torch.Tensor]) -> str:
    tensors[key] = torch.cat([tensors[(key := _middle(tensors))]] * 2)
    return key


def _nan(tensors: dict[str, torch.Tensor]) -> str:
    tensors[(key := _middle(tensors))].view(-1)[-1] = torch.nan
    return key


def _infinite(tensors: dict[str, torch.Tensor]) -> str:
    tensors[(key := _middle(tensors))].view(-1)[0] = -torch.inf
    return key


CHANGES = {
    _take: "is in none of the files",
    _add: "has no place in the model",
    _stretch: "the model's",
    _nan: "not finite",
    _infinite: "not finite",
}
PARTS = [
    ("sd3", "transformer"), ("sd3", "vae"), ("sd3", "text_encoder"), ("sd3", "text_encoder_3"),
    ("flux", "transformer"), ("flux", "text_encoder_2"), ("pixart-sigma", "transformer"),
    ("sana", "vae"), ("sana", "text_encoder"), ("qwenimage", "vae"), ("qwenimage", "transformer"),
    ("qwenimage", "text_encoder"), ("lumina2", "transformer"), ("auraflow", "text_encoder"), ("dit", "transformer"),
    ("up-sd3", "vae"), ("up-sd3", "transformer"), ("up-classes", "transformer"),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_pipeline_with_a_wrong_tensor_is_refused_by_file_and_key(
    name: str, part: str, change: Callable[..., str], saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved / name, tmp_path / "pipe")
    (file,) = (tmp_path / "pipe" / part).glob("*.safetensors")
    keys: list[str] = []
    _rewrite(file, lambda tensors: keys.append(change(tensors)))
    with pytest.raises(DavaeError, match=CHANGES[change]) as caught:
        load_pipeline(tmp_path / "pipe")
    assert str(tmp_path / "pipe" / part) in str(caught.value)
    assert keys[0].rsplit(".", 2)[-2] in str(caught.value)  # transformers may know it by another beginning
    with pytest.raises(DavaeError, match=CHANGES[change]):
        load_base(str(tmp_path / "pipe"))


@pytest.mark.parametrize("name", [*SMALL_PIPELINES, "up-sd3", "up-classes"])
def test_whole_folders_open_as_they_were_saved(name: str, saved: Path) -> None:
    """Tied embeddings are stored once, buffers that are made anew not at all."""
    pipe = load_pipeline(saved / name)
    for part in ("transformer", "vae", "text_encoder"):
        if getattr(pipe, part, None) is not None:
            again = type(getattr(pipe, part)).from_pretrained(saved / name / part).state_dict()
            assert all(torch.equal(value, again[key]) for key, value in getattr(pipe, part).state_dict().items())


@pytest.mark.parametrize(
    ("name", "part", "key"),
    [
        ("sd3", "text_encoder", "text_model.embeddings.position_ids"),
        ("sana", "text_encoder", "lm_head.weight"),
        ("flux", "text_encoder_2", "decoder.block.0.layer.0.layer_norm.weight"),
    ],
)
def test_what_older_and_larger_text_models_store_besides_may_lie_there(
    name: str, part: str, key: str, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved / name, tmp_path / "pipe")
    (file,) = (tmp_path / "pipe" / part).glob("*.safetensors")
    _rewrite(file, lambda tensors: tensors.update({key: torch.zeros(2, 2)}))
    load_pipeline(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["flux", "auraflow"])
def test_the_one_copy_of_tied_weights_must_be_there(name: str, saved: Path, tmp_path: Path) -> None:
    part = {"flux": "text_encoder_2", "auraflow": "text_encoder"}[name]
    shutil.copytree(saved / name, tmp_path / "pipe")
    (file,) = (tmp_path / "pipe" / part).glob("*.safetensors")

    def untie(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(("shared.weight", "embed_tokens.weight"))]:
            del tensors[key]

    _rewrite(file, untie)
    with pytest.raises(DavaeError, match="none of the files"):
        load_pipeline(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("name", "part", "entry"),
    [
        ("sd3", "transformer", {"num_layers": 1}),
        ("sd3", "transformer", {"num_layers": 3}),
        ("sd3", "text_encoder_3", {"num_layers": 1}),
        ("sana", "text_encoder", {"num_hidden_layers": 1, "layer_types": ["full_attention"]}),
        ("qwenimage", "vae", {"num_res_blocks": 2}),
        ("up-classes", "transformer", {"num_layers": 1}),
    ],
)
def test_a_configuration_of_another_network(
    name: str, part: str, entry: dict[str, Any], saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved / name, tmp_path / "pipe")
    config = tmp_path / "pipe" / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | entry))
    with pytest.raises(DavaeError, match="cannot be opened"):
        load_pipeline(tmp_path / "pipe")


# ---------------------------------------------------------------------- autoencoders

OPENERS: list[Callable[[Path], Any]] = [load_autoencoder, AutoencoderDA.from_pretrained, open_autoencoder]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("shards", [False, True], ids=["one file", "sharded"])
def test_an_autoencoder_with_a_wrong_tensor(
    change: Callable[..., str], shards: bool, saved: Path, tmp_path: Path
) -> None:
    vae = load_autoencoder(saved / "up-sd3" / "vae")
    vae.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    assert ("-of-" in file.name) == shards
    keys: list[str] = []
    _rewrite(file, lambda tensors: keys.append(change(tensors)))
    for opens in OPENERS:
        with pytest.raises(DavaeError) as caught:
            opens(tmp_path)
        assert keys[0] in str(caught.value)
        assert str(tmp_path) in str(caught.value)


def test_plain_diffusers_refuses_a_broken_autoencoder_too(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "up-sd3", tmp_path / "pipe")
    _rewrite(next((tmp_path / "pipe" / "vae").glob("*.safetensors")), _take)  # type: ignore[arg-type]
    with pytest.raises(DavaeError, match="none of the files"):
        DiffusionPipeline.from_pretrained(tmp_path / "pipe")


def test_an_index_that_leaves_a_tensor_out(saved: Path, tmp_path: Path) -> None:
    transformer = load_pipeline(saved / "sd3").transformer
    shutil.copytree(saved / "sd3", tmp_path / "pipe", ignore=shutil.ignore_patterns("transformer"))
    transformer.save_pretrained(tmp_path / "pipe" / "transformer", max_shard_size="20KB")
    load_pipeline(tmp_path / "pipe")
    (file,) = (tmp_path / "pipe" / "transformer").glob("*.index.json")
    index = json.loads(file.read_text())
    index["weight_map"].pop("proj_out.bias")
    file.write_text(json.dumps(index))
    with pytest.raises(DavaeError, match=r"proj_out\.bias"):
        load_pipeline(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"detail_std": [0.0] * 16}, r"detail_std\[0\] is 0\.0"),
        ({"detail_std": [1.0] * 15 + [-1.0]}, r"detail_std\[15\] is -1\.0"),
        ({"detail_std": [float("nan")] * 16}, "is nan"),
        ({"detail_std": [1.0] * 15}, "15 values, and there are 16 channels"),
        ({"detail_mean": [float("inf")] * 16}, "is inf"),
        ({"detail_mean": ["a"] * 16}, "must be a number"),
        ({"scaling_factor": 0.3}, "config.json has scaling_factor 0.3, but the base in its base_config implies 1.5"),
        ({"shift_factor": None}, "config.json has shift_factor None"),
        ({"latent_channels": 4}, "latent_channels 4"),
    ],
)
def test_statistics_that_cannot_be_ones(entry: dict[str, Any], words: str, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "up-sd3" / "vae", tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    assert json.loads(config.read_text())["detail_channels"] == 16
    config.write_text(json.dumps(json.loads(config.read_text()) | entry))
    for opens in OPENERS:
        with pytest.raises(DavaeError, match=words) as caught:
            opens(tmp_path / "vae")
        assert str(tmp_path / "vae") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("sd3", {"scaling_factor": 0.0}),
        ("sd3", {"shift_factor": float("nan")}),
        ("sana", {"scaling_factor": -1.0}),
        ("qwenimage", {"latents_std": [1.0, 0.0, 1.0, 1.0]}),
        ("qwenimage", {"latents_std": [1.0] * 3}),
        ("qwenimage", {"latents_mean": [float("nan")] * 4}),
    ],
)
def test_statistics_of_a_base(name: str, entry: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / name, tmp_path / "pipe")
    config = tmp_path / "pipe" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | entry))
    with pytest.raises(DavaeError, match=next(iter(entry))):
        load_pipeline(tmp_path / "pipe")
    if name == "sana":
        with pytest.raises(DavaeError, match="scaling_factor"):
            load_dc_ae(tmp_path / "pipe" / "vae")


@pytest.mark.parametrize("kind", [PlainAutoencoderDC, LDMAutoencoderKL, davae.LightningDiTTransformer2DModel])
def test_davae_s_own_classes_check_themselves(kind: Any, saved: Path, tmp_path: Path) -> None:
    if kind is PlainAutoencoderDC:
        PlainAutoencoderDC.from_config(small_pipeline("sana").vae.config).save_pretrained(tmp_path)
    elif kind is LDMAutoencoderKL:
        LDMAutoencoderKL(
            stem_channels=8, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(8,), norm_num_groups=4,
        ).save_pretrained(tmp_path)  # fmt: skip
    else:
        shutil.copytree(saved / "up-classes" / "transformer", tmp_path, dirs_exist_ok=True)
    kind.from_pretrained(tmp_path)
    keys: list[str] = []
    _rewrite(next(tmp_path.glob("*.safetensors")), lambda tensors: keys.append(_take(tensors)))
    with pytest.raises(DavaeError) as caught:
        kind.from_pretrained(tmp_path)
    assert keys[0] in str(caught.value)


def test_a_base_that_plain_diffusers_opened(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "sd3" / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    _rewrite(file, _nan)  # type: ignore[arg-type]
    with pytest.raises(DavaeError, match="not finite"):
        AutoencoderDA.from_base(AutoencoderKL.from_pretrained(tmp_path / "vae"), detail_channels=16)
    _rewrite(file, _take)  # type: ignore[arg-type]
    with pytest.raises(DavaeError, match="holds no numbers: its files lacked it"):
        AutoencoderDA.from_base(AutoencoderKL.from_pretrained(tmp_path / "vae"), detail_channels=16)


def test_statistics_in_memory_are_checked_as_those_in_files() -> None:
    base = small_pipeline("sd3").vae
    base.register_to_config(scaling_factor=float("nan"))
    with pytest.raises(DavaeError, match="scaling_factor is nan"):
        AutoencoderDA.from_base(base, detail_channels=16)


@pytest.mark.parametrize("channels", [(1, 1), (4, 4), (3, 4), (4, 3)])
def test_a_base_of_other_images_than_coloured_ones(channels: tuple[int, int]) -> None:
    base = AutoencoderKL(in_channels=channels[0], out_channels=channels[1], block_out_channels=(32,))
    with pytest.raises(DavaeError, match=f"images of {channels[0]} channels and gives {channels[1]}"):
        AutoencoderDA.from_base(base, detail_channels=16)


@pytest.mark.parametrize("content", [{"std": [1.0, 0.0]}, {"std": [1.0, -1.0]}, {"mean": [0.0, float("nan")]}])
@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_converted_statistics(content: dict[str, list[float]], suffix: str, tmp_path: Path) -> None:
    values = {"mean": [0.0, 0.0], "std": [1.0, 1.0]} | content
    file = tmp_path / f"statistics.{suffix}"
    if suffix == "json":
        file.write_text(json.dumps(values))
    else:
        save_file({name: torch.tensor(value) for name, value in values.items()}, file)
    with pytest.raises(DavaeError, match=rf"{file.name}: {next(iter(content))}\[1\]"):
        read_statistics(file)


def test_converted_weights_and_adapters_are_finite(tmp_path: Path) -> None:
    with pytest.raises(DavaeError, match="not finite: a"):
        check_keys({"a": torch.tensor([torch.nan])}, {"a": torch.zeros(1)}, "a model")
    base, pipe = debug_base(), upgraded(debug_base())
    save_adapters(pipe, tmp_path)
    _rewrite_with_header(tmp_path / LAYERS_FILE)
    with pytest.raises(DavaeError, match="not finite"):
        load_adapters(base, pipe.vae, tmp_path)


def _rewrite_with_header(file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    _nan(tensors)
    save_file(tensors, file, metadata=header)


def test_variances_and_formats() -> None:
    assert not_finite({"bn.running_var": torch.tensor([1.0, -1.0]), "bn.running_mean": torch.tensor([-1.0])}) == [
        "bn.running_var"
    ]
    tensors = {str(dtype): torch.full((3,), torch.inf).to(dtype) for dtype in (torch.float16, torch.bfloat16)}
    for place in range(0, 1000, 37):  # wherever it stands in what a processor reads at once
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            values = torch.ones(1000, dtype=dtype)
            values[place] = torch.nan
            assert not_finite({"a": values, "b": values.view(10, 100).T}) == ["a", "b"]
    assert not_finite(tensors | {"int": torch.ones(2, dtype=torch.int64), "empty": torch.ones(0)}) == list(tensors)


# ---------------------------------------------------------------------- variants


def test_file_names_of_variants() -> None:
    names = {
        "model.safetensors": None,
        "model.fp16.safetensors": "fp16",
        "model-00001-of-00002.safetensors": None,
        "model.fp16-00001-of-00002.safetensors": "fp16",
        "diffusion_pytorch_model-00001-of-00002.fp16.safetensors": "fp16",
        "diffusion_pytorch_model.non_ema.safetensors": "non_ema",
    }
    assert {name: variant_of(name) for name in names} == names


@pytest.mark.parametrize("dtype", [None, "saved"])
def test_the_only_variant_is_taken_and_said(dtype: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = small_pipeline("sd3").to(torch.bfloat16)
    pipe.save_pretrained(tmp_path, variant="bf16")
    with caplog.at_level(logging.WARNING, logger=model_files.__name__):
        opened = load_base(str(tmp_path), dtype=dtype)
    assert "variant 'bf16' alone" in caplog.text
    assert opened.transformer.dtype == (torch.bfloat16 if dtype else torch.float32)
    assert torch.equal(opened.vae.to(torch.bfloat16).encoder.conv_in.weight, pipe.vae.encoder.conv_in.weight)
    assert torch.equal(
        load_pipeline(tmp_path).transformer.pos_embed.proj.weight, pipe.transformer.pos_embed.proj.weight
    )
    pipe.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(DavaeError, match=r"variants alone, bf16, fp16: choose one \(--variant"):
        load_base(str(tmp_path))
    load_base(str(tmp_path), variant="fp16")
    with pytest.raises(DavaeError, match="no weights of the variant 'fp8': there are bf16, fp16"):
        load_base(str(tmp_path), variant="fp8")


def test_pickles_are_told_from_variants(tmp_path: Path) -> None:
    small_pipeline("sd3").save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(DavaeError, match="not safetensors but pickles"):
        load_base(str(tmp_path))
    for file in tmp_path.rglob("*.bin"):
        file.unlink()
    with pytest.raises(DavaeError) as caught:
        load_base(str(tmp_path))
    assert "run code" not in str(caught.value)


def test_a_name_on_the_hub_with_one_variant_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["model_index.json", "vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"]
    asked: list[str | None] = []

    def fetched(name: str, **options: Any) -> DiffusionPipeline:
        asked.append(options.get("variant"))
        if options.get("variant") is None:
            raise OSError(f"Could not find the necessary `safetensors` weights in {files} (variant=None)")
        return debug_base()

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fetched)
    load_base("someone/halves")
    assert asked == [None, "fp16"]
    files += ["vae/diffusion_pytorch_model.bf16.safetensors", "text_encoder/model.bf16.safetensors"]
    with pytest.raises(DavaeError, match="variants alone, bf16, fp16"):
        load_base("someone/halves")
    files[1:] = ["vae/diffusion_pytorch_model.bin"]
    with pytest.raises(DavaeError, match="pickles"):
        load_base("someone/pickles")


def test_components_of_different_variants() -> None:
    files = {"a": ["model.fp16.safetensors"], "b": ["model.bf16.safetensors"], "tokenizer": ["vocab.json"]}
    with pytest.raises(DavaeError, match="bf16, fp16"):
        chosen_variant("x", files, None)
    assert chosen_variant("x", {**files, "b": ["model.safetensors"]}, None) == "fp16"


# ---------------------------------------------------------------------- parts left out, and code beside the weights


@pytest.mark.parametrize("name", ["sd3", "sana", "qwenimage", "lumina2"])
def test_without_its_autoencoder_a_pipeline_keeps_its_sizes(name: str, tmp_path: Path) -> None:
    pipe = upgraded(small_pipeline(name))
    pipe.save_pretrained(tmp_path)
    whole, without = load_pipeline(tmp_path), load_pipeline(tmp_path, vae=None)
    assert without.vae is None
    assert without.vae_scale_factor == whole.vae_scale_factor == pipe.vae.spatial_compression
    assert without.image_processor.config.vae_scale_factor == whole.image_processor.config.vae_scale_factor
    call = call_arguments(name, scale=2) | {"output_type": "latent"}
    made = [p(**call, generator=torch.Generator().manual_seed(0)).images for p in (whole, without)]
    assert torch.equal(*made)


DAMAGES: dict[str, bytes | None] = {"missing": None, "empty": b"", "zeros": b"\0" * 99, "list": b"[]", "object": b"{}"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_of_a_pipeline_is_told_by_its_folder(damage: str, saved: Path, tmp_path: Path) -> None:
    """A tokenizer without its vocabulary, or a scheduler without settings, would open and make other images."""
    files = [file.relative_to(saved / "up-sd3") for file in (saved / "up-sd3").rglob("*.*") if file.is_file()]
    opened = []
    for file in files:
        pipe = tmp_path / "-".join(file.parts)
        shutil.copytree(saved / "up-sd3", pipe)
        content = DAMAGES[damage]
        (pipe / file).unlink() if content is None else (pipe / file).write_bytes(content)
        try:
            load_pipeline(pipe)
            opened.append(str(file))
        except DavaeError as error:
            assert str((pipe / file).parent) in str(error)  # noqa: PT017  one file after another
            assert "\n" not in str(error)  # noqa: PT017
    assert opened == ["vae/davae.py"]  # for use without davae
    assert len(files) == 19


def test_a_configuration_that_builds_nothing_is_told_by_its_folder(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "up-sd3", tmp_path / "pipe")
    for part, key in (("transformer", "in_channels"), ("vae", "scale"), ("text_encoder_3", "d_model")):
        file = tmp_path / "pipe" / part / "config.json"
        before = file.read_text(encoding="utf-8")
        file.write_text(json.dumps(json.loads(before) | {key: "x"}), encoding="utf-8")
        with pytest.raises(DavaeError, match=part):
            load_pipeline(tmp_path / "pipe")
        file.write_text(before, encoding="utf-8")


@pytest.mark.parametrize("opening", [open_autoencoder, load_autoencoder, AutoencoderDA.from_pretrained])
def test_weights_are_read_for_finite_values_once(opening: Any, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(model_files, "not_finite", lambda tensors: read.append(len(tensors)) or [])
    model = opening(saved / "up-sd3" / "vae")
    assert read == [len(model.state_dict())]


def test_auto_model_takes_davae_s_class_and_not_the_folder_s_code(saved: Path, tmp_path: Path) -> None:
    for part, expected in (("vae", AutoencoderDA), ("transformer", davae.LightningDiTTransformer2DModel)):
        shutil.copytree(saved / "up-classes" / part, tmp_path / part)
        (tmp_path / part / "davae.py").write_text("raise RuntimeError('run without need')")
        assert type(AutoModel.from_pretrained(str(tmp_path / part), trust_remote_code=True)) is expected


HOMES = {
    "runtime/model_files.py", "runtime/weight_files.py", "pipelines/saving/opening.py", "models/portable.py",
}  # fmt: skip
READ_OTHERWISE = {  # tensors that are not a model's, or whose reader compares them itself
    "pipelines/saving/adapters.py", "training/checkpoints/checkpoint.py", "interop/sd3_transformer_files.py",
    "experiments/variants.py", "report/build.py", "data/cache/shards.py",
}  # fmt: skip


def test_models_are_opened_in_one_place_alone() -> None:
    """Elsewhere ``from_pretrained`` is handed to ``open_model``, or belongs to a tokenizer."""
    root = Path(davae.__file__).parent
    found = set()
    for file in root.rglob("*.py"):
        where = str(file.relative_to(root))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                opens = called.endswith(".from_pretrained") and called != "AutoTokenizer.from_pretrained"
                if (opens or called in ("torch.load", "load_file", "safetensors.torch.load")) and where not in HOMES:
                    found.add((where, called))
    assert {where for where, called in found if called.endswith("from_pretrained")} == set()
    assert {where for where, _ in found} <= READ_OTHERWISE
