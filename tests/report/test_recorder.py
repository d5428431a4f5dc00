import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from davae.errors import DavaeError
from davae.report import FigureRecorder, Figures, Summary
from davae.report.recorder import enlarged, save_png
from davae.report.schema import TENSOR_FILE
from tests.report.conftest import CLASSES, make_summary


def test_summary_reads_back_what_was_written(tmp_path: Path) -> None:
    summary = make_summary()
    summary.write(tmp_path)
    assert Summary.read(tmp_path) == summary
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_figures_read_back_and_every_file_and_tensor_is_there(run_dir: Path) -> None:
    figures = Figures.read(run_dir)
    tensors = load_file(run_dir / TENSOR_FILE)
    assert figures.classes == CLASSES
    assert all([figures.sections, figures.maps, figures.spectra])
    for section in figures.sections:
        assert section.rows
        for row in section.rows:
            assert len(row.zooms) == len(row.pictures)
            for picture in (*row.pictures, *row.zooms):
                assert (run_dir / picture.file).is_file()
    for entry in figures.maps:
        assert tensors[entry.key].shape == (30, 2)
    for spectrum in figures.spectra:
        assert tensors[f"power.{spectrum.key}"].shape == tensors[f"frequency.{spectrum.key}"].shape


def test_png_holds_the_image(tmp_path: Path) -> None:
    image = torch.tensor([-1.0, 0.0, 1.0, 3.0]).view(1, 2, 2).expand(3, 2, 2)
    found = np.asarray(Image.open(save_png(image, tmp_path / "a.png")))
    assert found[..., 0].tolist() == [[0, 128], [255, 255]]
    with pytest.raises(DavaeError, match="NaN"):
        save_png(image * float("nan"), tmp_path / "b.png")


def test_crops_lie_at_the_same_place_in_all_columns(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1
    recorder = FigureRecorder(tmp_path)
    recorder.add_comparison("x", title="", text="", columns={"a": a, "b": -a}, zoom=8)
    first, second = (np.asarray(Image.open(tmp_path / f"figures/x-00-{i}-zoom.png")).astype(int) for i in range(2))
    assert np.abs(first + second - 255).max() <= 1
    assert first.shape == (8, 8, 3)


def test_upscaling_keeps_the_range_and_the_full_size_untouched() -> None:
    image = torch.rand(1, 3, 8, 8).round() * 2 - 1
    large = enlarged(image, 16, 16)
    assert large.shape == (1, 3, 16, 16)
    assert large.abs().max() <= 1
    assert torch.equal(enlarged(image, 8, 8), image)


def test_probe_accuracies_are_returned(tmp_path: Path) -> None:
    labels = torch.arange(2).repeat_interleave(20)
    generator = torch.Generator().manual_seed(0)
    message = labels.view(-1, 1, 1, 1) + 0.1 * torch.randn(40, 2, 2, 2, generator=generator)
    noise = torch.randn(40, 2, 2, 2, generator=generator)
    probes = FigureRecorder(tmp_path, classes=["a", "b"]).add_latents(message, noise, labels)
    assert probes["linear_probe_base"] == 1.0
    assert probes["linear_probe_detail"] < 0.9


def test_the_summary_of_an_earlier_run_opens(tmp_path: Path) -> None:
    summary = make_summary()
    earlier = json.loads(summary.model_dump_json())
    for row in ("upgraded", "base_upscaled", "real"):
        earlier["generation"][f"swd_{row}"] = earlier["generation"].pop(f"swd_finest_{row}")
    (tmp_path / "summary.json").write_text(json.dumps(earlier))
    assert Summary.read(tmp_path) == summary


def test_mistakes_are_named(tmp_path: Path) -> None:
    recorder = FigureRecorder(tmp_path, classes=["only one"])
    with pytest.raises(DavaeError, match=r"'b': 3.*'captions': 2"):
        recorder.add_comparison(
            "x", title="", text="", columns={"a": torch.zeros(2, 3, 8, 8), "b": torch.zeros(3, 3, 8, 8)}
        )
    with pytest.raises(DavaeError, match="label 1 has no name"):
        recorder.add_latents(torch.zeros(4, 2, 2, 2), torch.zeros(4, 2, 2, 2), torch.tensor([0, 0, 1, 1]))
    bad = make_summary().model_dump() | {"tokens": {"base": 1, "native": 2, "upgraded": 1, "other": 3}}
    (tmp_path / "summary.json").write_text(json.dumps(bad))
    with pytest.raises(DavaeError, match=r"summary\.json: tokens\.other: Extra"):
        Summary.read(tmp_path)
