"""The shipped configurations that spread a model over processes, on two gloo processes: as one process learns.

FSDP2, and FSDP2 that keeps the weights gathered.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from accelerate.commands.launch import launch_command, launch_command_parser
from safetensors.torch import load_file
from tests.end_to_end import children
from tests.end_to_end.trainings import POISONED_STEP, run, run_all

from davae.bases.tiny import debug_base
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.training.checkpoints.run_directory import read_metrics
from davae.warm_start import new_channel_masks

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "src" / "davae" / "configs" / "accelerate"
SPREAD = ["fsdp2", "fsdp2-zero2"]
STEPS, MIDDLE, LOGGED = 4, 3, 2  # what the middle keeps of an unlogged window counts too
OFFICIAL = ["autoencoder.target=base", "autoencoder.optimizer.weight_decay=0.1"]
LOOP = {
    "steps": STEPS,
    "gradient_accumulation": 2,
    "max_grad_norm": 0.5,  # below what comes, so that it clips
    "log_every": LOGGED,
    "checkpoint_every": MIDDLE,
    "validate_every": 0,
    "validation_images": 2,
}


def _job(stage: str, out: Path, batch: int, autoencoder: Path, *extra: str, adaptive: bool = False) -> dict:
    overrides = [
        *(f"{stage}.loop.{k}={v}" for k, v in (LOOP | {"batch_size": batch}).items()),
        f"{stage}.optimizer.learning_rate=1e-4",
        f"autoencoder.alignment.adaptive={str(adaptive).lower()}",
        f"autoencoder.reconstruction.gan.weight={0.1 * adaptive}",
        "autoencoder.reconstruction.gan.start_step=1",
        "autoencoder.reconstruction.gan.filters=4",
        "autoencoder.reconstruction.gan.layers=1",
        *extra,
    ]
    return {"stage": stage, "out": str(out), "overrides": overrides, "autoencoder": str(autoencoder)}


def _jobs(out: Path, batch: int, autoencoder: Path) -> dict[str, dict]:
    def diffusion(name: str, *extra: str) -> dict:
        return _job("diffusion", out / name, batch, autoencoder, *extra)

    return {
        "autoencoder": _job("autoencoder", out / "autoencoder", batch, autoencoder, *OFFICIAL),
        "full": diffusion("full", "diffusion.sample_details=true"),
        "lora": diffusion("lora", "diffusion.tune.mode=lora"),
        "new": diffusion("new", "diffusion.tune.mode=new_channels"),
        "poisoned": {"stage": "poisoned", "out": str(out / "poisoned")},
    }


def _made_by_two(out: Path, autoencoder: Path) -> list[dict]:
    """Trainings that two processes with the whole model each are the measure of.

    Adaptive weights come from the images of one process; half precision rounds sums of another size otherwise.
    """
    half = [
        "diffusion.loop.precision=bf16",
        "diffusion.tune.mode=lora",
        "diffusion.tune.frozen_dtype=bfloat16",
    ]
    return [
        _job("autoencoder", out / "adaptive", 2, autoencoder, "autoencoder.train_detail_encoder=false", adaptive=True),
        _job("diffusion", out / "half", 2, autoencoder, *half),
    ]


def _back_to_the_middle(run_directory: Path, copy: Path) -> None:
    shutil.copytree(run_directory, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS}")


def _launch(jobs: list[dict], log: Path, config: Path) -> None:
    """What ``accelerate launch`` does with a configuration, up to torchrun; its processes are ours."""
    words = ["--config_file", str(config), "--num_processes", "2", "--main_process_port", "0"]

    def instead_of_torchrun(_: object) -> None:
        children.together(run_all, jobs, log=log, environment=dict(os.environ))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed.run, "run", instead_of_torchrun)
        launch_command(launch_command_parser().parse_args([*words, "-m", "tests.end_to_end.trainings"]))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Each training on one process, some on two that hold the whole model each."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("one")
    vae = AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8)
    vae.save_pretrained(out / "vae")
    jobs = _jobs(out, 4, out / "vae")
    for name in ("autoencoder", "full", "lora", "new"):
        run(jobs[name])
    children.together(run_all, _made_by_two(out, out / "vae"), log=out / "log")
    return out


@pytest.fixture(scope="module", params=SPREAD)
def runs(request, one, tmp_path_factory):
    """Each training spread over two processes, of two the second half on the other number; beside them ``one``."""
    out = tmp_path_factory.mktemp(request.param)
    (out / "one").symlink_to(one)
    two = _jobs(out / "two", 2, one / "vae")
    one_to_two = two["full"] | {"out": str(out / "one_to_two" / "full")}
    _back_to_the_middle(one / "full", Path(one_to_two["out"]))
    jobs = [*two.values(), one_to_two, *_made_by_two(out / "two", one / "vae")]
    _launch(jobs, out / "log", CONFIGS / f"{request.param}.yaml")
    two_to_one = _jobs(out / "two_to_one", 4, one / "vae")["lora"]
    _back_to_the_middle(out / "two" / "lora", Path(two_to_one["out"]))
    run(two_to_one)
    return out


PAIRS = [
    "two/autoencoder",
    "two/full",
    "two/lora",  # trained and frozen weights in one sharded block
    "two/new",  # a part of a weight learns
    "one_to_two/full",
    "two_to_one/lora",
    "two/adaptive",
    "two/half",  # computed in bfloat16, with frozen weights kept in it
]


@pytest.mark.parametrize("other", PAIRS)
def test_losses_norms_and_every_tensor_agree_with_one_process(runs, other):
    one, other = runs / "one" / other.split("/")[1], runs / other
    first, second = (read_metrics(found / "metrics.jsonl") for found in (one, other))
    assert len(first) == len(second) == STEPS // LOGGED + 1
    for a, b in zip(first[:-1], second[:-1]):
        assert b["total"] == pytest.approx(a["total"], rel=1e-5)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-5)
    files = sorted(p.relative_to(one) for p in one.rglob("*.safetensors"))
    assert files == sorted(p.relative_to(other) for p in other.rglob("*.safetensors"))
    assert len(files) >= 7  # two checkpoints of three files, and a result
    for file in files:
        a, b = load_file(one / file), load_file(other / file)
        assert a.keys() == b.keys(), file
        for name in a:
            near = 2**-7 if a[name].dtype == torch.bfloat16 else 1e-4  # the next number, where rounding falls otherwise
            torch.testing.assert_close(b[name], a[name], rtol=near, atol=1e-5, msg=f"{file}: {name}")


@pytest.mark.parametrize("number", ["one", "two"])
def test_the_new_channels_alone_learn_where_they_shall(runs, number):
    """The base's entries of a widened weight stay bit for bit, in the same tensor where others change."""
    start = upgrade_pipeline(debug_base(), AutoencoderDA.from_pretrained(runs / "one" / "vae"))
    found = load_file(runs / number / "new" / "checkpoints" / f"step-{STEPS}" / "model.safetensors")
    before = start.transformer.state_dict()
    masks = new_channel_masks(start.transformer, start.vae.layout)
    assert len(masks) >= 2
    for name, mask in masks.items():
        after = found[f"transformer.{name}"]
        assert torch.equal(after[~mask], before[name][~mask]), name
        assert not torch.equal(after[mask], before[name][mask]), name


@pytest.mark.parametrize("name", ["full", "lora"])
def test_results_are_ordinary_folders(runs, name):
    """Sharded modules have classes of their own, which must not reach the files."""
    folder = "pipeline/transformer/config.json"
    one, two = (json.loads((runs / n / name / folder).read_text()) for n in ("one", "two"))
    assert one == two
    assert two["_class_name"] == "LightningDiTTransformer2DModel"


def test_what_one_shard_finds_not_finite_all_leave_out_and_name(runs):
    out = runs / "two" / "poisoned"
    for name in ("skipped_steps.jsonl", "skipped_steps.rank-1.jsonl"):
        message = [json.loads(line) for line in (out / name).read_text().splitlines()]
        assert [(t["step"], t["layers"]) for t in message] == [(POISONED_STEP + 1, ["bad"])]

    def weights(step: int) -> dict[str, torch.Tensor]:
        return load_file(out / "checkpoints" / f"step-{step}" / "model.safetensors")

    before, after, later = (weights(POISONED_STEP + i) for i in range(3))
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not any(torch.equal(after[n], later[n]) for n in after)
