"""What the stages train, on what, and what stays as it was."""

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from davae.bases.tiny import debug_base
from davae.benchmark.training_stages import SeparatePassesObjective
from davae.data import open_dataset
from davae.data.in_memory import ImagesInMemory, LatentsInMemory, MixedScales
from davae.diffusion import FlowLoss, FlowProcess
from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.pipelines.families import family_of
from davae.recipes.read import load_recipe
from davae.recipes.settings import FlowLossSettings, ImageTerms, ReconstructionSettings
from davae.training.autoencoder.losses import ReconstructionLoss, laplacian_l1
from davae.training.autoencoder.objective import StructuredObjective, noised
from davae.training.autoencoder.stage import AutoencoderStage
from davae.training.checkpoints.run_directory import read_metrics
from davae.training.diffusion import ClassMap, DiffusionObjective, DiffusionStage
from davae.training.diffusion.inputs import prepare_inputs
from davae.training.diffusion.train import train_transformer
from davae.training.diffusion.validation import held_out_loss
from davae.training.loop.loop import train
from davae.warm_start import new_channel_masks


def _vae(**options):
    torch.manual_seed(0)
    return AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8, **options)


def _parts(length=12):
    return (
        open_dataset(f"procedural:{length}", resolution=32),
        open_dataset("procedural", resolution=32, hold_out=4, part="held_out"),
    )


def test_the_autoencoder_stage_leaves_the_base_as_it_was(tmp_path):
    vae = _vae()
    before = {k: v.clone() for k, v in vae.base.state_dict().items()}
    start = {k: v.clone() for k, v in vae.state_dict().items() if not k.startswith("base.")}
    train(AutoencoderStage(vae, load_recipe("debug").autoencoder, *_parts()), tmp_path, {})
    assert all(torch.equal(v, before[k]) for k, v in vae.base.state_dict().items())
    moved = [k for k, v in start.items() if not torch.equal(v, vae.state_dict()[k])]
    assert len(moved) > 0.9 * len(start)


def test_one_image_can_be_overfitted():
    """Reconstruction and alignment both become good: they do not exclude each other."""
    recipe = load_recipe("debug", ["autoencoder.reconstruction.gan.weight=0", "autoencoder.alignment.adaptive=false"])
    vae = _vae(detail_dropout=0.0).train()
    objective = StructuredObjective(vae, recipe.autoencoder.alignment, recipe.autoencoder.reconstruction)
    batch = {"image": _parts()[0][0]["image"][None]}
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(120):
        torch.manual_seed(step)
        terms = objective(batch, step)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        losses.append({k: float(v.detach()) for k, v in terms.items()})
    assert losses[-1]["l1"] < 0.35 * losses[0]["l1"]
    assert losses[-1]["alignment"] < 0.1


def test_the_total_is_the_sum_of_its_weighted_terms():
    recipe = load_recipe("debug", ["autoencoder.reconstruction.gan.weight=0", "autoencoder.alignment.adaptive=false"])
    settings = recipe.autoencoder
    objective = StructuredObjective(_vae(), settings.alignment, settings.reconstruction)
    terms = objective({"image": torch.stack([_parts()[0][i]["image"] for i in range(2)])}, 0)
    weights = settings.reconstruction
    expected = (
        weights.l1_weight * terms["l1"]
        + weights.laplacian_weight * terms["laplacian"]
        + weights.kl_weight * terms["kl"]
        + settings.alignment.weight * terms["alignment"]
    )
    torch.testing.assert_close(terms["total"], expected)


@pytest.mark.parametrize("adaptive", [True, False])
def test_samples_without_details_have_terms_of_their_own(adaptive, monkeypatch):
    """The loss is the mean over the samples of each one's own weighted terms."""
    stage, vae, _ = _stage_of(
        "autoencoder.reconstruction.gan.weight=0",
        f"autoencoder.alignment.adaptive={str(adaptive).lower()}",
        "autoencoder.reconstruction.laplacian_weight=0",
        "autoencoder.decoder_alone.l1_weight=0.5",
        "autoencoder.decoder_alone.mse_weight=3",
        "autoencoder.rescale_details=false",
        detail_dropout=0.5,
    )
    objective, weight = stage.objective.train(), stage.settings.reconstruction.l1_weight
    images = torch.stack([_parts()[0][i]["image"] for i in range(8)])
    decode, seen = vae.decode_structured, []

    def decoded(z, z_d):
        made = decode(z, z_d)
        seen.append((z_d.detach(), made.detach()))
        return made

    monkeypatch.setattr(vae, "decode_structured", decoded)
    terms = objective({"image": images}, 0)
    ((z_d, made),) = seen
    without = [bool((details == 0).all()) for details in z_d]
    assert 0 < sum(without) < 8
    errors = made - images
    l1, mse = errors.abs().flatten(1).mean(1), errors.square().flatten(1).mean(1)
    own = [0.5 * a + 3 * b if gone else weight * a for a, b, gone in zip(l1, mse, without, strict=True)]
    torch.testing.assert_close(terms["reconstruction"], torch.stack(own).mean())
    torch.testing.assert_close(terms["l1"], l1.mean())
    torch.testing.assert_close(terms["mse"], (mse * torch.tensor(without)).mean())
    terms["total"].backward()
    assert vae.last_decoder_weight.grad.abs().sum() > 0


def test_kept_details_are_rescaled_or_not(monkeypatch):
    vae = _vae(detail_dropout=0.5).train()
    seen = []
    decode = vae.decode_structured
    monkeypatch.setattr(vae, "decode_structured", lambda z, z_d: seen.append(z_d.detach()) or decode(z, z_d))
    settings = load_recipe("debug", ["autoencoder.reconstruction.gan.weight=0"]).autoencoder
    images = torch.stack([_parts()[0][i]["image"] for i in range(8)])
    for rescaled in (True, False):
        torch.manual_seed(0)
        parts = settings.alignment, settings.reconstruction
        StructuredObjective(vae, *parts, rescale_details=rescaled).train()({"image": images}, 0)
    assert seen[1].abs().max() > 0
    torch.testing.assert_close(seen[0], 2 * seen[1])


def test_a_batch_without_dropped_samples_has_the_same_terms():
    terms = ImageTerms(l1_weight=0.0, mse_weight=2.0)
    loss = ReconstructionLoss(ReconstructionSettings(laplacian_weight=1.0), terms)
    images, made = torch.rand(2, 4, 3, 16, 16).unbind(0)
    plain = ReconstructionLoss(ReconstructionSettings(laplacian_weight=1.0))(images, made)
    none, every = (loss(images, made, torch.full((4,), gone)) for gone in (False, True))
    assert none.keys() == every.keys() == {"l1", "mse", "laplacian", "reconstruction"}
    assert {k: none[k] for k in plain} == plain
    assert none["mse"] == 0
    torch.testing.assert_close(every["reconstruction"], 2 * (made - images).square().mean())


def _stage_of(*overrides, **options):
    """A stage of the debug recipe, its autoencoder, and what that starts as."""
    vae = _vae(**options)
    start = {k: v.clone() for k, v in vae.state_dict().items()}
    stage = AutoencoderStage(vae, load_recipe("debug", list(overrides)).autoencoder, *_parts())
    return stage, vae, start


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_frozen_detail_encoder_stays_and_the_rest_learns(adaptive, tmp_path):
    overrides = ["train_detail_encoder=false", f"alignment.adaptive={str(adaptive).lower()}", "loop.steps=2"]
    stage, vae, start = _stage_of(*(f"autoencoder.{o}" for o in overrides))
    train(stage, tmp_path, {})
    moved = {k.partition(".")[0] for k, v in vae.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == {"down", "up", "joint_decoder"}
    learning = {n for n, p in vae.named_parameters() if p.requires_grad}
    assert {id(p) for p in vae.trained_parameters()} == {id(dict(vae.named_parameters())[n]) for n in learning}
    vae.train()
    assert vae.down.training
    assert not any(m.training for m in vae.detail_encoder.modules())


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_decoder_alone_learns_from_the_base_latent_alone(adaptive, tmp_path):
    overrides = [f"alignment.adaptive={str(adaptive).lower()}", "loop.steps=2", "loop.log_every=1"]
    stage, vae, start = _stage_of(*(f"autoencoder.{o}" for o in overrides), detail_dropout=1.0)
    result = train(stage, tmp_path, {})
    moved = {k.partition(".")[0] for k, v in vae.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == {"up", "joint_decoder"}
    learning = {id(p) for p in vae.parameters() if p.requires_grad}
    assert {id(p) for p in vae.trained_parameters()} == learning
    first = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert not {"kl", "alignment"} & first.keys()
    assert result.metrics["psnr"] == result.metrics["psnr_no_details"]
    assert "alignment" not in result.metrics
    z, z_d = torch.randn(1, 4, 2, 2), torch.randn(1, 8, 2, 2)
    alone = vae.decode_structured(z, torch.zeros_like(z_d))
    assert torch.equal(vae.decode_structured(z, z_d), alone)
    assert torch.equal(vae.train().decode_structured(z, vae.drop_details(z, z_d)[0]), alone)
    saved = type(vae).from_pretrained(result.result)
    assert torch.equal(saved.decode_structured(z, z_d), saved.decode_structured(z, torch.zeros_like(z_d)))


def test_the_frozen_detail_encoders_of_all_levels_trained_together():
    level1 = _vae()
    vae = AutoencoderDA.from_base(level1, scale=2, detail_channels=8)
    vae.train_levels(together=True, detail_encoders=False)
    for level in (vae.at_level(1), vae):
        assert not any(p.requires_grad for p in level.detail_encoder.parameters())
        assert all(p.requires_grad for p in level.joint_decoder.parameters())


@pytest.mark.parametrize("levels", [1, 2])
def test_the_target_may_be_the_base_vae_s_reconstruction(levels):
    """At full size; a reconstruction of the base VAE itself then costs nothing, and the image something."""
    settings = load_recipe("debug", ["autoencoder.alignment.adaptive=false"]).autoencoder
    vae = _vae()
    if levels == 2:
        vae = AutoencoderDA.from_base(vae, scale=2, detail_channels=8)
    vae.eval()
    images = _parts()[0][0]["image"][None]
    base = vae.base_vae
    with torch.no_grad():
        made = base.decode(base.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
        seen = {}
        for target in ("image", "base"):
            objective = StructuredObjective(vae, settings.alignment, settings.reconstruction, target=target)
            torch.manual_seed(0)
            seen[target] = objective({"image": images}, 0)
        torch.manual_seed(0)
        below = vae.encode_prefix(images)
        ours = vae.decode_structured(below, vae.encode_own_details(images).sample())
    torch.testing.assert_close(seen["base"][prefix(vae) + "l1"], (ours - made).abs().mean())
    torch.testing.assert_close(seen["image"][prefix(vae) + "l1"], (ours - images).abs().mean())
    assert seen["base"][prefix(vae) + "alignment"] == seen["image"][prefix(vae) + "alignment"]
    kept = {name: make(images) for name, make in objective.keepable().items()}
    assert (kept["target"] - made).abs().max() < 2.5e-4
    torch.manual_seed(0)
    again = objective({"image": images, **kept}, 0)
    torch.testing.assert_close(again["total"], seen["base"]["total"], rtol=0, atol=2.5e-4)


def test_noise_on_details_is_in_their_standard_deviations_and_in_training_alone():
    settings = load_recipe("debug", ["autoencoder.alignment.adaptive=false"]).autoencoder
    z_d = torch.randn(400, 3, 4, 4) * torch.tensor([1.0, 5.0, 0.2])[:, None, None]
    strength = ((noised(z_d, 0.6) - z_d) / z_d.std(dim=(0, 2, 3), keepdim=True)).std(dim=(1, 2, 3))
    assert float(strength.mean()) == pytest.approx(0.3, abs=0.03)
    assert 0.5 < float(strength.max()) < 0.9
    vae = _vae(detail_dropout=0.0, start="random")  # the warm one does not see its details yet
    plain, noisy = (
        StructuredObjective(vae, settings.alignment, settings.reconstruction, detail_noise=noise) for noise in (0, 1.0)
    )
    batch = {"image": _parts()[0][0]["image"][None]}
    for training in (False, True):
        vae.train(training)
        seen = []
        for objective in (plain, noisy):
            torch.manual_seed(0)
            seen.append(objective(batch, 0))
        assert seen[0]["alignment"] == seen[1]["alignment"]  # the details themselves are untouched
        assert torch.equal(seen[0]["l1"], seen[1]["l1"]) is not training


def test_what_does_not_change_is_kept_once():
    """The base latent, and the target where it is the base's; levels that learn together have a target each."""
    settings = load_recipe("debug", ["autoencoder.target=base"]).autoencoder
    stage = AutoencoderStage(_vae(), settings, *_parts(), cache_latents=True)
    image = stage.dataset[0]["image"]
    assert stage.dataset[0]["target"].dtype is torch.float16
    assert stage.dataset[0]["target"].shape == image.shape
    assert "target" not in AutoencoderStage(_vae(), _settings("debug"), *_parts(), cache_latents=True).dataset[0]
    both = AutoencoderDA.from_base(_vae(), scale=2, detail_channels=8)
    both.train_levels(together=True)
    objective = StructuredObjective(both, settings.alignment, settings.reconstruction, target="base")
    assert list(objective.keepable()) == ["base_latent"]


def _settings(recipe):
    return load_recipe(recipe).autoencoder


def prefix(vae):
    return f"level{len(vae.levels) - 1}_" if len(vae.levels) > 2 else ""


def test_the_base_is_no_target_without_its_decoder():
    settings = load_recipe("debug", ["autoencoder.target=base"]).autoencoder
    vae = _vae()
    vae.drop_base_decoder()
    with pytest.raises(DavaeError, match=r"autoencoder\.target=base needs .* set autoencoder\.target=image"):
        AutoencoderStage(vae, settings, *_parts())


def test_adaptive_alignment_weight_is_the_gradient_ratio():
    recipe = load_recipe("debug", ["autoencoder.reconstruction.gan.weight=0"])
    settings = recipe.autoencoder
    vae = _vae()
    batch = {"image": _parts()[0][0]["image"][None]}
    plain, fast = (
        kind(vae, settings.alignment, settings.reconstruction)
        for kind in (SeparatePassesObjective, StructuredObjective)
    )
    torch.manual_seed(0)
    terms = plain(batch, 0)
    norms = [
        torch.autograd.grad(terms[name], vae.alignment_weight, retain_graph=True)[0].norm()
        for name in ("reconstruction", "alignment")
    ]
    expected = settings.alignment.weight * norms[0] / (norms[1] + 1e-4)
    torch.testing.assert_close(terms["alignment_weight"], expected)
    torch.manual_seed(0)
    torch.testing.assert_close(fast(batch, 0)["alignment_weight"], expected)


def test_laplacian_counts_a_thin_line_as_much_as_its_band():
    """A one-pixel stripe lies in the finest level almost alone; a flat offset in the remainder alone."""
    stripes = torch.zeros(1, 3, 32, 32)
    stripes[..., ::2] = 1.0
    stripes = stripes - stripes.mean()
    flat = torch.full((1, 3, 32, 32), 0.5)
    assert float(laplacian_l1(flat)) == pytest.approx(0.5 / 4)
    assert float(laplacian_l1(stripes)) == pytest.approx(0.5 / 4, rel=1e-5)


class _KnowsTheData(nn.Module):
    """A transformer that predicts ``data - noise`` exactly, from ``x_t`` and the data it was told."""

    def __init__(self, data):
        super().__init__()
        self.data = data
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, noisy, t, labels):
        level = (1 - t).view(-1, 1, 1, 1)
        noise = (noisy - (1 - level) * self.data) / level
        return type("Output", (), {"sample": self.data - noise})()


@pytest.mark.parametrize("form", ["velocity", "x0"])
def test_a_perfect_transformer_has_no_loss(form):
    """Path, time and sign agree with the transformer's convention: t = 1 - sigma, data - noise."""
    data = torch.randn(16, 6, 4, 4)
    layout, loss = LatentLayout(2, 4), FlowLossSettings(form=form)
    process = FlowProcess(FlowLoss(layout, form=form), shift=lambda latent: 3.0)
    objective = DiffusionObjective(family_of(debug_base()), _KnowsTheData(data), layout, process, loss)
    terms = objective({"latent": data, "label": torch.zeros(16, dtype=torch.long)}, 0)
    assert float(terms["total"]) < 1e-6


def _diffusion(tmp_path, *overrides):
    recipe = load_recipe("debug", list(overrides))
    vae = _vae()
    base = debug_base()
    pipe = upgrade_pipeline(base, vae)
    inputs = prepare_inputs(pipe, vae, recipe.diffusion, *_parts())
    stage = DiffusionStage(pipe, vae.layout, recipe.diffusion, inputs, before=debug_base())
    return base, pipe, train(stage, tmp_path, {})


def test_distilled_from_the_base_nothing_of_it_is_lost_at_the_start():
    """The widened transformer predicts what its frozen base does: the base channels' loss is 0, held out it is not."""
    recipe, vae, base = load_recipe("debug", ["diffusion.loss.base_distillation=1"]), _vae(), debug_base()
    pipe = upgrade_pipeline(base, vae, copy=False)
    inputs = prepare_inputs(pipe, vae, recipe.diffusion, *_parts())
    stage = DiffusionStage(pipe, vae.layout, recipe.diffusion, inputs, before=base)
    objective = stage.objective.train()
    batch = {"latent": torch.randn(8, vae.layout.channels, 4, 4), "label": torch.arange(8)}
    assert float(objective(batch, 0)["base"]) < 1e-10
    assert float(objective.eval()(batch, 0)["base"]) > 0.1
    assert not any("teacher" in name for name in (*objective.state_dict(), *dict(objective.named_modules())))
    with pytest.raises(DavaeError, match="base_distillation is for an upgrade"):
        DiffusionStage(pipe, vae.layout, recipe.diffusion, inputs)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_distillation_keeps_the_bases_predictions(tmp_path, mode):
    """After steps at a high rate the base's own prediction is kept at least three times as well as without it."""
    noisy, labels, moved = torch.randn(8, _vae().layout.channels, 4, 4), torch.arange(8), []
    for share in (0, 1):
        base, pipe, _ = _diffusion(
            tmp_path / str(share),
            f"diffusion.tune.mode={mode}",
            f"diffusion.loss.base_distillation={share}",
            "diffusion.loop.steps=40",
            "diffusion.optimizer.learning_rate=3e-3",
        )
        with torch.no_grad():
            family, level = family_of(base), torch.full((8,), 0.5)
            own = family.predict(base.transformer.eval(), noisy[:, :4].contiguous(), level, {"class_labels": labels})
            made = family.predict(pipe.transformer.eval(), noisy, level, {"class_labels": labels})
        moved.append(float((made[:, :4] - own).square().mean()))
    assert moved[1] < moved[0] / 3


def test_new_channels_only_leaves_the_base_weights_bit_equal(tmp_path):
    base, pipe, _ = _diffusion(tmp_path, "diffusion.tune.mode=new_channels", "diffusion.loop.steps=3")
    old, new = base.transformer.state_dict(), pipe.transformer.state_dict()
    for name, value in old.items():
        if value.shape == new[name].shape:
            assert torch.equal(value, new[name]), name
    assert torch.equal(new["patch_embed.weight"][:, :4], old["patch_embed.weight"])
    assert torch.equal(new["proj_out.weight"][:4], old["proj_out.weight"])
    assert new["patch_embed.weight"][:, 4:].any()
    assert new["proj_out.weight"][4:].any()


def test_lora_ends_as_a_plain_pipeline(tmp_path):
    base, _, result = _diffusion(
        tmp_path, "diffusion.tune.mode=lora", "diffusion.tune.lora.rank=2", "diffusion.loop.steps=3"
    )
    merged = DiffusionPipeline.from_pretrained(result.result).transformer
    assert not any("lora" in name for name in merged.state_dict())
    block = "transformer_blocks.0."
    assert not torch.equal(
        merged.state_dict()[f"{block}attn.to_q.weight"],
        base.transformer.state_dict()[f"{block}attn.to_q.weight"],
    )
    assert torch.equal(
        merged.state_dict()[f"{block}norm1.weight"], base.transformer.state_dict()[f"{block}norm1.weight"]
    )


def test_new_channels_need_details(tmp_path):
    base = debug_base()
    settings = load_recipe("debug", ["diffusion.tune.mode=lora"]).diffusion
    with pytest.raises(DavaeError, match="needs detail channels"):
        DiffusionStage(base, LatentLayout(4, 0), settings, prepare_inputs(base, base.vae, settings, *_parts()))


def test_classes_are_matched_by_name():
    base = debug_base()
    classes = ClassMap(["zebra", "tree", "balloon"], base)
    labels = base.labels
    assert [classes(0), classes(1), classes(2), classes(-1)] == [12, labels["tree"], labels["balloon"], 12]
    assert classes.known == sorted([labels["tree"], labels["balloon"]])
    assert ClassMap(["zebra"], base).known == [12]


def test_mixed_scales_takes_crops_and_wholes():
    full = ImagesInMemory(open_dataset("procedural:40", resolution=32))

    def halve(images):
        return torch.nn.functional.avg_pool2d(images, 2)

    mixed = MixedScales(full, halve, crops=0.5, seed=1)
    crops = 0
    for index in range(40):
        image, whole = mixed.item(index, 0)["image"], full[index]["image"]
        assert torch.equal(image, mixed.item(index, 0)["image"])
        if torch.equal(image, halve(whole[None])[0]):
            continue
        crops += 1
        windows = whole.unfold(1, 16, 1).unfold(2, 16, 1)  # [3, 17, 17, 16, 16]
        assert (windows == image[:, None, None]).all(dim=(0, 3, 4)).any()
    assert 10 <= crops <= 30


def test_images_in_memory_are_made_once_and_kept_to_a_grey_level():
    source = open_dataset("procedural:3", resolution=32)
    kept = ImagesInMemory(source)
    first = kept[1]["image"]
    source.scenes = None  # must not be asked again
    assert torch.equal(kept[1]["image"], first)
    fresh = open_dataset("procedural:3", resolution=32)[1]["image"]
    assert (first - fresh).abs().max() <= 1 / 255 + 1e-6


def test_latents_in_memory_equal_encoding_each_alone():
    source = open_dataset("procedural:5", resolution=32)
    encode = lambda images: images.mean(1, keepdim=True)  # noqa: E731
    cached = LatentsInMemory(source, encode, lambda i: {**i, "label": i["label"] + 1})
    for index in range(5):
        item = source[index]
        torch.testing.assert_close(cached[index]["latent"], encode(item["image"][None])[0])
        assert cached[index]["label"] == item["label"] + 1


class _Guesses(nn.Module):
    """A transformer whose error depends on the noise."""

    def forward(self, noisy, t, labels):
        return type("Output", (), {"sample": 0.3 * noisy})()


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_the_held_out_loss_does_not_depend_on_the_batch(batch_size):
    items = [{"latent": torch.randn(6, 4, 4), "label": 0, "caption": "", "id": str(i), "skipped": []} for i in range(7)]
    layout, loss = LatentLayout(2, 4), FlowLossSettings()
    process = FlowProcess(FlowLoss(layout), shift=lambda latent: 3.0)
    objective = DiffusionObjective(family_of(debug_base()), _Guesses(), layout, process, loss).eval()

    def losses(size, seed=0):
        state = torch.get_rng_state()
        found = held_out_loss(objective, items, batch_size=size, step=9, seed=seed, device=torch.device("cpu"))
        assert torch.equal(torch.get_rng_state(), state)  # the training's own draws are left alone
        return found

    assert losses(batch_size) == pytest.approx(losses(2), rel=1e-5)
    assert losses(batch_size, seed=1) != pytest.approx(losses(2), rel=1e-3)


def test_both_learning_rates_are_logged(tmp_path):
    more = ["diffusion.optimizer.learning_rate=1e-4", "diffusion.tune.new_channels_learning_rate=1e-3"]
    _diffusion(tmp_path, "diffusion.loop.steps=1", "diffusion.loop.log_every=1", *more)
    line = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert line["learning_rate"] == pytest.approx(1e-4)
    assert line["learning_rate_widened"] == pytest.approx(1e-3)


@pytest.mark.parametrize("mode", ["full", "lora", "new_channels"])
def test_the_rate_of_new_channels_is_theirs_alone(mode, tmp_path):
    """AdamW's first step moves a weight by its rate: the base's own part of a widened layer has the optimizer's."""
    base, pipe, _ = _diffusion(
        tmp_path,
        f"diffusion.tune.mode={mode}",
        "diffusion.tune.new_channels_learning_rate=1e-3",
        "diffusion.loss.detail_schedule=constant",
        "diffusion.optimizer.learning_rate=1e-4",
        "diffusion.loop.steps=1",
    )
    start = upgrade_pipeline(base, _vae()).transformer
    trained = dict(pipe.transformer.named_parameters())
    new, own = [], []
    for name, mask in new_channel_masks(start, LatentLayout(4, 8)).items():
        moved = (trained[name] - start.get_parameter(name)).detach().abs()
        new.append(moved[mask])
        own.append(moved[~mask])
    assert float(torch.cat(new).median()) == pytest.approx(1e-3, rel=0.01)
    assert float(torch.cat(own).median()) == pytest.approx(0 if mode == "new_channels" else 1e-4, rel=0.01)


# ---------------------------------------------------------------- prefixes of channels (DC-AE 1.5)


def _prefix_objective(channels, share):
    torch.manual_seed(0)
    vae = _vae()
    pipe = upgrade_pipeline(debug_base(), vae)
    loss = FlowLossSettings(prefixes={"channels": channels, "share": share})
    process = FlowProcess(FlowLoss(vae.layout))
    return DiffusionObjective(family_of(pipe), pipe.transformer, vae.layout, process, loss), vae.layout


def test_channels_outside_the_prefix_of_all_samples_get_no_gradient():
    """Neither their input weights, which see zeros, nor their output weights, which have no loss."""
    objective, layout = _prefix_objective([4], share=0.999999)
    batch = {"latent": torch.randn(8, 12, 4, 4), "label": torch.zeros(8, dtype=torch.long)}
    masks = {f"transformer.{n}": mask for n, mask in new_channel_masks(objective.transformer, layout).items()}
    for train_mode in (True, False):
        objective.train(train_mode).zero_grad()
        losses = objective(batch, 0)
        losses["total"].backward()
        moved = [bool(p.grad[masks[n]].any()) for n, p in objective.named_parameters() if n in masks]
        assert len(moved) == len(masks) >= 2
        assert any(moved) is not train_mode  # without prefixes the output layer's learn at once
        assert (float(losses["detail"]) == 0) is train_mode
        assert any(p.grad.any() for n, p in objective.named_parameters() if n not in masks)


def test_prefixes_change_the_training_and_not_the_measure():
    """All channels count in the held-out loss, so that it compares with a training without prefixes."""
    with_them, without = _prefix_objective([4, 8], share=0.7)[0], _prefix_objective([], share=0.7)[0]
    batch = {"latent": torch.randn(8, 12, 4, 4), "label": torch.zeros(8, dtype=torch.long)}

    def total(objective):
        torch.manual_seed(3)
        return float(objective(batch, 0)["total"].detach())

    assert total(with_them.train()) != total(without.train())
    assert total(with_them.eval()) == total(without.eval())


def test_a_prefix_that_is_none_is_refused_before_anything_is_encoded(tmp_path, monkeypatch):
    _vae().save_pretrained(tmp_path / "autoencoder")
    recipe = load_recipe("debug", ["diffusion.loss.prefixes.channels=[4,12]"])
    monkeypatch.setattr("davae.training.diffusion.train.load_recipe_base", None)  # a call would be a TypeError
    with pytest.raises(DavaeError, match=r"loss\.prefixes\.channels: 12 is no prefix of a latent of 12 channels"):
        train_transformer(recipe, tmp_path / "run", tmp_path / "autoencoder")


def test_previews_drift_from_the_base_that_they_start_as(tmp_path):
    """At a warm start the base part of every sample is the base's own sample; a random start is not."""
    vae = _vae()
    vae.save_pretrained(tmp_path / "autoencoder")
    found = {}
    for start in ("zero", "random"):
        changes = ["diffusion.loop.validate_at_start=true", f"diffusion.tune.new_channels_start={start}"]
        out = tmp_path / start
        train_transformer(load_recipe("debug", [*changes, "diffusion.loop.steps=2"]), out, tmp_path / "autoencoder")
        lines = read_metrics(out / "metrics.jsonl")
        found[start] = {line["step"]: line["preview_drift"] for line in lines if "preview_drift" in line}
    assert found["zero"].keys() == found["random"].keys() == {0, 2}
    assert found["zero"][0] == pytest.approx(0, abs=1e-6)
    assert found["random"][0] > 1e-3
    assert found["zero"][2] > 1e-5
