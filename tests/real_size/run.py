"""The commands of docs/my-pipeline.md on a pipeline of SD3.5-medium's real architecture and size, with random weights.

    python -m tests.real_size.run FOLDER [--json FILE] [--only plan,cache] [--side 1024]

builds the pipeline in ``FOLDER/base`` (7 GB in bfloat16; T5 is cut to two of its 24 layers) and photographs in
``FOLDER/photos``, unless they are there, and runs each command of the walk in a process of its own: plan, dry run,
stage 1 for two steps with a kill in between, cache, stage 2 with a LoRA of rank 256 for two steps, upgrade, generate,
export, and opening the export in plain diffusers without davae. Of each it records seconds, and the largest main memory
in use: anonymous and shared pages, and the same with mapped files, which the system can drop and read again: frozen
weights are such. Of the trainings and the cache it records the latter for each phase besides, beside what
`davae plan --recipe` says of it. Sampling takes four steps.

Weights are random, so images are noise: what is shown is that everything fits and goes on.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

CAPTIONS = ("a red fox in the snow", "a house by the sea", "a street at night", "a mountain and a river")
IMAGES = 8
RECIPE = "sd35-medium-1024"


@dataclass
class Measured:
    """One command: how it ended, its seconds, and the largest main memory of its processes in bytes.

    ``peak_bytes`` is without mapped files; ``resident_bytes`` is with them, and so is that of each of the ``phases``.
    """

    command: str
    status: int
    seconds: float
    peak_bytes: int
    resident_bytes: int
    phases: dict[str, int]


Ends = Mapping[str, Callable[[], bool]]
"""Names of the phases of a command, in order, and what is true once each is over."""


def measured(
    command: Sequence[str], folder: Path, log: Path, *, stop_when: Callable[[], bool] | None = None, ends: Ends
) -> Measured:
    """Run a command in ``folder``, sampling its memory twenty times a second; ``stop_when`` says when to kill it."""
    began, peak, resident = time.monotonic(), 0, 0
    phases, waiting = dict.fromkeys(ends, 0), list(ends)
    with log.open("ab") as output:
        child = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        while child.poll() is None:
            found = [_in_use(pid) for pid in _family(child.pid)]
            now = sum(all_pages for _, all_pages in found)
            peak, resident = max(peak, sum(own for own, _ in found)), max(resident, now)
            while len(waiting) > 1 and ends[waiting[0]]():
                waiting.pop(0)
            if waiting:
                phases[waiting[0]] = max(phases[waiting[0]], now)
            if stop_when is not None and stop_when():
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            time.sleep(0.05)
    seconds = round(time.monotonic() - began, 1)
    return Measured(" ".join(command), child.returncode, seconds, peak, resident, phases)


def training_phases(run: Path, steps: int) -> Ends:
    """By what a run's directory holds. Writing the checkpoint of the last step belongs to the steps."""
    return {
        "start": (run / "config.yaml").is_file,
        "step": (run / "checkpoints" / f"step-{steps}").is_dir,
        "validation": (run / "samples" / f"step-{steps}.png").is_file,
        "export": lambda: False,
    }


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    try:
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(found for child in below for found in _family(int(child)))]


def _in_use(pid: int) -> tuple[int, int]:
    """Bytes of anonymous and shared pages, and of all resident pages."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    pages = {
        key: 1024 * int(rest.split()[0])
        for key, _, rest in (line.partition(":") for line in lines)
        if "rss" in key.lower()
    }
    return pages.get("RssAnon", 0) + pages.get("RssShmem", 0), pages.get("VmRSS", 0)


def build_base(folder: Path) -> None:
    """The pipeline, saved in bfloat16, one part in memory at a time."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    from davae.bases.debug_text import clip, t5
    from davae.planner.architectures import build, build_text_encoder, find_architecture

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    architecture = find_architecture("stabilityai/stable-diffusion-3.5-medium")
    encoders = {name: dict(config) for name, config in architecture.text_encoders.items()}
    encoders["text_encoder_3"]["num_layers"] = 2
    index: dict[str, object] = {"_class_name": "StableDiffusion3Pipeline"}
    for name, config in encoders.items():
        encoder = build_text_encoder(name, config, "cpu").to(torch.bfloat16)
        encoder.save_pretrained(folder / name)
        index[name] = ["transformers", type(encoder).__name__]
    del encoder
    texts = {**clip(projection=True), **clip("_2", projection=True), **t5("_3")}
    for name, part in texts.items():
        if name.startswith("tokenizer"):
            part.save_pretrained(folder / name)
            index[name] = ["transformers", type(part).__name__]
    for name in ("vae", "transformer"):
        model = build(getattr(architecture, name), "cpu").to(torch.bfloat16)
        model.save_pretrained(folder / name)
        index[name] = ["diffusers", type(model).__name__]
        del model
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))


def write_photographs(folder: Path, side: int) -> None:
    """Drawn scenes with captions, as PNG."""
    from PIL import Image

    from davae.data import open_dataset
    from davae.runtime.pictures import to_bytes

    scenes = open_dataset(f"procedural:{IMAGES}", resolution=side)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(IMAGES):
        pixels = to_bytes(scenes[i]["image"]).byte().permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i % len(CAPTIONS)])


def walk(folder: Path, side: int, only: Sequence[str]) -> dict[str, Measured]:
    """Run the commands that are asked for, in order, each with a log of its own."""
    davae = [sys.executable, "-m", "davae"]
    data = ["data.path=photos", f"data.resolution={side}", "data.hold_out=2", "data.workers=0", "base=base"]
    loop = ["steps=2", "batch_size=1", "gradient_accumulation=1", "validation_images=1", "checkpoint_every=1"]
    loop += ["validate_every=0", "log_every=1"]
    first = [f"autoencoder.loop.{one}" for one in loop] + ["autoencoder.statistics_images=4"]
    second = [f"diffusion.loop.{one}" for one in loop] + ["diffusion.sample.num_inference_steps=4"]
    stage1 = [*davae, "train", "autoencoder", "--recipe", RECIPE, *data, *first]
    stage2 = [*davae, "train", "diffusion", "--recipe", RECIPE, *data, *second]
    size = ["--height", str(side), "--width", str(side), "--steps", "4", "--prompt", CAPTIONS[0]]
    licence = ["--license", "other", "--license-name", "random-weights"]
    run1, run2 = (f"runs/{RECIPE}-{stage}" for stage in ("autoencoder", "diffusion"))
    plain = (
        "import torch; from diffusers import DiffusionPipeline; "
        "pipe = DiffusionPipeline.from_pretrained('exported', trust_remote_code=True, dtype=torch.bfloat16); "
        "print(type(pipe).__name__, pipe.transformer.config.in_channels)"
    )
    checkpoint = folder / run1 / "checkpoints" / "step-1"
    commands = {
        "plan": [*davae, "plan", "base", "--resolution", str(side), "--scale", "2"],
        "plan of phases": [*davae, "plan", "--recipe", RECIPE, *data, *first, *second, "--cpu", "--json", "plan.json"],
        "dry run": [*stage1, "--dry-run"],
        "stage 1 (killed)": stage1,
        "stage 1": stage1,
        "cache": [*davae, "cache", "--recipe", RECIPE, *data],
        "stage 2": stage2,
        "upgrade": [*davae, "upgrade", "base", "--autoencoder", f"{run1}/autoencoder", "--out", "upgraded"],
        "generate": [*davae, "generate", f"{run2}/pipeline", "--out", "images", *size],
        "export": [*davae, "export", run2, "--out", "exported", *licence],
        "open in diffusers": [sys.executable, "-c", plain],
    }
    stops = {"stage 1 (killed)": checkpoint.is_dir}
    phases = {name: training_phases(folder / run, 2) for name, run in (("stage 1", run1), ("stage 2", run2))}
    found: dict[str, Measured] = {}
    for name, command in commands.items():
        if only and name not in only:
            continue
        log = folder / f"{name.replace(' ', '-').replace(',', '')}.log"
        found[name] = one = measured(command, folder, log, stop_when=stops.get(name), ends=phases.get(name, {}))
        sizes = f"{one.peak_bytes / 1e9:.2f} GB, {one.resident_bytes / 1e9:.2f} GB with mapped files"
        print(f"{name}: status {one.status}, {one.seconds:.0f} s, {sizes}", flush=True)
    return found


def compare(folder: Path, found: Mapping[str, Measured]) -> dict[str, dict[str, dict[str, float]]]:
    """Gigabytes of each phase, measured and planned; what `davae plan` gives is of a machine without a device."""
    planned = json.loads((folder / "plan.json").read_text())["phases"]
    seen = {"autoencoder": "stage 1", "cache": "cache", "diffusion": "stage 2"}
    table: dict[str, dict[str, dict[str, float]]] = {}
    for stage, command in seen.items():
        if command not in found:
            continue
        bytes_planned = {phase: one["without_device_bytes"] for phase, one in planned[stage].items()}
        bytes_found = found[command].phases
        if not bytes_found:  # phases alternate
            bytes_planned, bytes_found = {"all": max(bytes_planned.values())}, {"all": found[command].resident_bytes}
        for phase, measured_bytes in bytes_found.items():
            pair = {"measured": measured_bytes / 1e9, "planned": bytes_planned[phase] / 1e9}
            table.setdefault(command, {})[phase] = {name: round(value, 2) for name, value in pair.items()}
            print(f"{command}, {phase}: {pair['measured']:.2f} GB, planned {pair['planned']:.2f} GB", flush=True)
    return table


def main() -> int:
    """Build what is missing, walk, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="names of commands, separated by commas without spaces")
    parser.add_argument("--side", type=int, default=1024)
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base" / "model_index.json").is_file():
        build_base(folder / "base")
    if not (folder / "photos" / f"{IMAGES - 1}.png").is_file():
        write_photographs(folder / "photos", options.side)
    found = walk(folder, options.side, [name for name in options.only.split(",") if name])
    phases = compare(folder, found) if (folder / "plan.json").is_file() else {}
    if options.json is not None:
        about = {
            "command": "python -m tests.real_size.run FOLDER --json FILE",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "side": options.side,
            "commands": {name: asdict(one) | {"command": name} for name, one in found.items()},
            "phases_gb": phases,
        }
        options.json.write_text(json.dumps(about, indent=1) + "\n")
    killed = {"stage 1 (killed)": -signal.SIGKILL}
    return int(any(one.status != killed.get(name, 0) for name, one in found.items()))


if __name__ == "__main__":
    sys.exit(main())
