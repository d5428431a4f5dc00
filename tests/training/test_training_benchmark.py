"""The fast forms of a step are the plain one, computed otherwise; the benchmark's rows say what was measured."""

import json

import pytest
import torch
from typer.testing import CliRunner

from davae.bases.tiny import debug_base
from davae.benchmark.training import bench_training, profile_step
from davae.benchmark.training_stages import (
    FORMS,
    DiffusionBenchStage,
    SeparatePassesObjective,
    StepSettings,
    autoencoder_stage,
)
from davae.cli.main import app
from davae.data.loading.stream import collate
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines.sampling.speed import order_channels_last
from davae.planner.architectures import find_architecture
from davae.recipes.settings import AlignmentSettings, GanSettings, ReconstructionSettings
from davae.training.autoencoder.adaptive_weights import with_gradients
from davae.training.autoencoder.losses import make_gan_loss
from davae.training.autoencoder.objective import StructuredObjective
from davae.training.loop.loop import steps_of

# A large eps keeps AdamW from turning rounding of a vanishing gradient into a whole step.
SMALL = {"resolution": 32, "detail_channels": 8, "batch": 2, "learning_rate": 1e-3, "eps": 1e-3}


@pytest.fixture(scope="module")
def architecture():
    return find_architecture("debug")


# The discriminator's AdamW makes whole steps of rounding, so that with it later steps drift apart.
@pytest.mark.parametrize(("stage", "steps"), [("autoencoder", 4), ("autoencoder with GAN", 1), ("diffusion", 4)])
def test_weights_agree_after_some_steps_of_every_form(architecture, tmp_path, stage, steps):
    make = DiffusionBenchStage if stage == "diffusion" else autoencoder_stage
    settings = StepSettings(**SMALL, gan="GAN" in stage)
    ends, start = {}, None
    for form in FORMS:
        made = make(architecture, settings, form)
        trained = made.modules[0].parameters()
        start = start or [p.detach().clone() for p in trained]
        step = steps_of(made, tmp_path / form)
        for _ in range(steps):
            step()
        ends[form] = [p.detach().clone() for p in trained]
    moved = max(float((a - b).abs().max()) for a, b in zip(start, ends["plain"], strict=True))
    assert moved > 1e-4 * steps
    for form in FORMS[1:]:
        for one, other in zip(ends[form], ends["plain"], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def _objective(plain, gan, levels, alignment=True):
    torch.manual_seed(0)
    vae = AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8)
    if levels == 2:
        vae = AutoencoderDA.from_base(vae, scale=2, detail_channels=16)
    vae.train()
    vae.train_levels(together=True)
    settings = GanSettings(weight=0.3 if gan else 0.0, filters=4, layers=1)
    gan_losses = [make_gan_loss(settings)[0] for _ in range(levels)]
    kind = SeparatePassesObjective if plain else StructuredObjective
    return kind(vae, AlignmentSettings(adaptive=alignment), ReconstructionSettings(gan=settings), gan_losses)


@pytest.mark.parametrize(
    ("gan", "alignment", "levels"), [(False, True, 1), (True, True, 1), (True, False, 1), (True, True, 2)]
)
def test_one_backward_gives_the_gradients_of_many(gan, alignment, levels):
    images = torch.rand(2, 3, 16 * 2**levels, 16 * 2**levels) * 2 - 1
    losses, gradients = [], []
    for plain in (True, False):
        objective = _objective(plain, gan, levels, alignment)
        torch.manual_seed(1)
        losses.append(objective({"image": images}, 0))
        (2.0 * losses[-1]["total"]).backward()  # as with accumulation and scaling
        gradients.append({n: p.grad for n, p in objective.named_parameters() if p.grad is not None})
    assert losses[0].keys() == losses[1].keys()
    for name in losses[0]:
        torch.testing.assert_close(losses[1][name], losses[0][name], rtol=1e-4, atol=1e-6, msg=name)
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        scale = float(expected.abs().max())
        # Two levels with all weights adaptive: the sums of biases' gradients cancel, and rounding reaches 4e-4 of them.
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=1e-3 * scale + 1e-7, msg=name)


def test_the_official_losses_and_gradients_are_the_same_in_every_form(architecture):
    losses, gradients = {}, {}
    for form in FORMS:
        stage = autoencoder_stage(architecture, StepSettings(**SMALL, official=True), form)
        order_channels_last(stage.objective.train()) if form != "plain" else stage.objective.train()
        items = [stage.dataset[i] for i in range(2)]
        assert ("target" in items[0]) == (form == "fast, cached")
        batch = collate(items)
        if form == "fast, cached":  # kept as float16: exact here, since L1's gradient changes by jumps
            kept, batch["target"] = batch["target"], stage.objective._base_reconstruction(batch["image"])
            assert float((kept - batch["target"]).abs().max()) < 2.5e-4
        torch.manual_seed(1)
        losses[form] = stage.objective(batch, 0)
        losses[form]["total"].backward()
        parameters = dict(stage.autoencoder.named_parameters())
        gradients[form] = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        assert {name.split(".")[0] for name in gradients[form]} == {"down", "up", "joint_decoder"}
    for form in FORMS[1:]:
        for name, value in losses["plain"].items():
            torch.testing.assert_close(losses[form][name], value, rtol=1e-5, atol=1e-6, msg=name)
        for name, expected in gradients["plain"].items():
            bound = 1e-4 * float(expected.abs().max()) + 1e-7
            torch.testing.assert_close(gradients[form][name], expected, rtol=0, atol=bound, msg=name)


def test_the_official_losses_by_hand(architecture):
    """Against the base's reconstruction of the full image; l1 + 0.2 alignment + 1e-7 KL, summed over a sample."""
    stage = autoencoder_stage(architecture, StepSettings(**SMALL, official=True), "fast")
    vae, images = stage.autoencoder.train(), stage.dataset.images[:2]
    torch.manual_seed(1)
    found = stage.objective({"image": images}, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        target = vae.base.decode(vae.base.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
        posterior = vae.encode_own_details(images)
        z, z_d = vae.encode_base(images), posterior.sample()
        made = vae.decode_structured(z, z_d)
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).sum((1, 2, 3)).mean()
    aligned = (z_d.unflatten(1, (z.shape[1], -1)).mean(2) - vae.alignment_target(z)).square().mean()
    torch.testing.assert_close(found["l1"], (made - target).abs().mean(), rtol=1e-4, atol=1e-6)
    wanted = (made - target).abs().mean() + 0.2 * aligned + 1e-7 * kl
    torch.testing.assert_close(found["total"].detach(), wanted, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(target, images, atol=1e-2)


def test_a_scalar_with_known_gradients():
    x = torch.ones(3, requires_grad=True)
    made = with_gradients(torch.tensor(5.0), [x], [torch.tensor([2.0, 4.0, 6.0])], scale=2.0)
    (made * 3).backward()
    assert made.item() == 5.0
    assert torch.equal(x.grad, torch.tensor([3.0, 6.0, 9.0]))


def test_cached_base_latents_are_those_that_would_be_encoded(architecture):
    stage = autoencoder_stage(architecture, StepSettings(**SMALL), "fast, cached")
    item = stage.dataset[1]
    with torch.no_grad():
        expected = stage.autoencoder.encode_base(item["image"][None])[0]
    torch.testing.assert_close(item["base_latent"], expected, atol=1e-5, rtol=1e-5)
    seen = []
    stage.autoencoder.encode_base = lambda images: seen.append(images)
    stage.objective({"image": item["image"][None], "base_latent": item["base_latent"][None]}, 0)
    assert not seen


def test_a_step_reads_nothing_back_from_the_device(architecture):
    """Between two logged steps the host never waits: no value of a tensor is read."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    for objective in (
        autoencoder_stage(architecture, StepSettings(**SMALL, gan=True), "fast").objective,
        DiffusionBenchStage(find_architecture("debug-sd3"), StepSettings(**SMALL), "fast, cached").modules[0].module,
    ):
        batch = {"image": torch.rand(2, 3, 32, 32)}
        if not hasattr(objective, "autoencoder"):
            conditioning = {"prompt_embeds": torch.rand(2, 8, 16), "pooled_prompt_embeds": torch.rand(2, 16)}
            batch = {"latent": torch.rand(2, 12, 4, 4), "conditioning": conditioning}
        with Reads() as reads:
            objective(batch, 0)["total"].backward()
        assert reads.found == 0


def test_a_bad_step_is_left_out_in_the_plain_form_too(architecture, tmp_path):
    stage = autoencoder_stage(architecture, StepSettings(**SMALL), "plain")
    stage.dataset.images.fill_(float("nan"))
    before = [p.detach().clone() for p in stage.modules[0].parameters()]
    steps_of(stage, tmp_path)()
    assert all(map(torch.equal, before, stage.modules[0].parameters()))


def test_rows_and_profile_of_the_verb(tmp_path):
    file = tmp_path / "training.json"
    arguments = [
        "bench",
        "training",
        "debug",
        "--resolution",
        "32",
        "--batch",
        "2",
        "--repeats",
        "1",
        "--profile",
    ]
    done = CliRunner().invoke(app, [*arguments, "--json", str(file)])
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert [(r["stage"], r["form"]) for r in found["rows"]] == [
        (stage, form) for stage in ("autoencoder", "diffusion") for form in FORMS
    ]
    assert len(found["profiles"]) >= 2
    for row in found["rows"]:
        assert row["images_per_second"] == pytest.approx(2 / row["step_seconds"])
        assert row["memory_bytes"] > 0
        assert row["form"] != "plain" or (row["speedup"], row["memory_over_plain"]) == (1.0, 1.0)
    for profiled in found["profiles"].values():
        assert sum(profiled["parts"].values()) == pytest.approx(1.0)
        assert min(profiled["parts"].values()) >= 0
        assert profiled["operators"][0]["seconds"] >= profiled["operators"][1]["seconds"] > 0


def test_the_profile_finds_where_time_goes():
    weight = torch.ones(400, 400, requires_grad=True)
    optimizer = torch.optim.AdamW([weight])

    def step():
        (weight @ weight @ weight).sum().backward()
        optimizer.step()

    found = profile_step(step)
    assert found.parts["data"] == 0
    assert min(found.parts[part] for part in ("forward", "backward", "optimizer")) > 0
    assert "aten::mm" in {line.name for line in found.operators}


def test_a_base_that_makes_films_takes_a_step_of_the_autoencoder_stage(tmp_path):
    """Its weights have five dimensions, which know no channels-last order."""
    settings = StepSettings(resolution=64, detail_channels=8, batch=1)
    made = autoencoder_stage(find_architecture("debug-qwenimage"), settings, FORMS[-1])
    before = [p.detach().clone() for p in made.modules[0].parameters()]
    steps_of(made, tmp_path)()
    assert any(not torch.equal(a, b) for a, b in zip(before, made.modules[0].parameters(), strict=True))


def test_mistakes_are_told():
    with pytest.raises(DavaeError, match="34 pixels are not a multiple of 8"):
        bench_training("debug", resolution=34)
    with pytest.raises(DavaeError, match="forms must be plain and others"):
        bench_training("debug", resolution=32, forms=("fast",))
    with pytest.raises(DavaeError, match="no adversarial term: give --official or --gan"):
        bench_training("debug", resolution=32, official=True, gan=True)
    with pytest.raises(DavaeError, match="give --official with it"):
        bench_training("debug", resolution=32, lpips="vgg16.pth")
    with pytest.raises(DavaeError, match="stages must be among autoencoder, diffusion, not both"):
        bench_training("debug", resolution=32, stages=("both",))
    with pytest.raises(DavaeError, match="repeats must be"):
        bench_training("debug", resolution=32, repeats=0)
