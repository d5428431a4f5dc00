"""A small run directory with made-up numbers."""

import json
from pathlib import Path

import pytest
import torch

from davae.report import (
    Alignment,
    EachWay,
    FigureRecorder,
    Generation,
    Reconstruction,
    Summary,
    WarmStart,
)

CLASSES = ["<script>alert('class')</script>", "brick & weave", *(f"class {i}" for i in range(8))]


def make_summary(**changes: object) -> Summary:
    summary = Summary(
        title="A run <b>of tests</b>",
        created="2025-01-01T00:00:00Z",
        command="davae demo --out 'runs/<demo>'",
        hardware={"processor": "two cores", "accelerator": None},
        image_size=EachWay(base=16, native=32, decoder_alone=32, upgraded=32),
        tokens=EachWay(base=4, native=16, decoder_alone=4, upgraded=4),
        flops_per_image=EachWay(base=1.0e9, native=4.4e9, decoder_alone=1.05e9, upgraded=1.1e9),
        seconds_per_image=EachWay(base=0.1, native=0.36, decoder_alone=0.11, upgraded=0.12),
        reconstruction=Reconstruction(psnr_upgraded=26.25, psnr_decoder_alone=25.25, psnr_base_upscaled=24.0),
        generation=Generation(
            swd_finest_upgraded=0.3,
            swd_finest_base_upscaled=0.4,
            swd_finest_decoder_alone=0.25,
            swd_levels_upgraded=[0.3, 0.1],
            preview_drift=0.05,
            seeds_apart=0.4,
        ),
        alignment=Alignment(base_latents_equal=True, loss=0.5),
        warm_start=WarmStart(max_base_difference=2.4e-7, max_detail_output=0.0),
        wall_seconds=61.0,
        peak_memory_bytes=2_000_000_000,
        settings={"autoencoder": {"steps": 3, "learning_rate": 3e-4}},
        skipped=[("<img src=x>.png", "is a text file")],
    )
    return summary.model_copy(update=changes)


def record_figures(run_dir: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    recorder = FigureRecorder(run_dir, classes=CLASSES)
    images = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    small = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    recorder.add_reconstructions(images, small, images * 0.9, CLASSES[:2], alone=images * 0.8)
    recorder.add_samples(small, images, CLASSES[:2], alone=images * 0.8)
    labels = torch.arange(10).repeat(3)
    recorder.add_latents(
        torch.randn(30, 4, 4, 4, generator=generator), torch.randn(30, 8, 4, 4, generator=generator), labels
    )
    recorder.add_spectra("images", {"Real": images, "Upgraded": images * 0.9})
    recorder.write()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    record_figures(tmp_path)
    make_summary().write(tmp_path)
    for stage in ("autoencoder", "diffusion"):
        (tmp_path / stage).mkdir()
        lines = [json.dumps({"step": i, "loss": 1 / (i + 1), "lr": 1e-4}) for i in range(30)]
        (tmp_path / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path
