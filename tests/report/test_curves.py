"""Figures of docs/results that set runs side by side."""

import json
import runpy
from pathlib import Path

import pytest
from PIL import Image

from davae.errors import DavaeError

_CURVES = runpy.run_path(str(Path(__file__).parents[2] / "docs/results/dc-ae/curves.py"))
save_curves, save_spectra = _CURVES["save_curves"], _CURVES["save_spectra"]


def _run(folder, values):
    folder.mkdir()
    lines = [{"step": 10 * i, "psnr": v} for i, v in enumerate(values)] + [{"step": 5, "loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_hold_what_was_logged(tmp_path):
    runs = {"a": _run(tmp_path / "a", [1.0, 2.0]), "b": _run(tmp_path / "b", [3.0])}
    lines = save_curves(runs, "psnr", tmp_path / "out" / "curve.png", label="dB")
    assert lines == {"a": ([0, 10], [1.0, 2.0]), "b": ([0], [3.0])}
    assert Image.open(tmp_path / "out" / "curve.png").width > 300
    written = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert written == {"x": "step", "y": "dB", "lines": {"a": [[0, 10], [1.0, 2.0]], "b": [[0], [3.0]]}}


def test_a_run_that_logged_an_earlier_name_of_the_metric(tmp_path):
    line = {"step": 4, "spectral_distance_128": 2.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    for name in ("spectral_distance_128", "spectrum_db_128"):
        assert save_curves({"a": tmp_path}, name, tmp_path / "curve.png") == {"a": ([4], [2.5])}


def test_a_metric_that_was_not_logged(tmp_path):
    with pytest.raises(DavaeError, match="no 'ssim'"):
        save_curves({"a": _run(tmp_path / "a", [1.0])}, "ssim", tmp_path / "curve.png")


def test_spectra_leave_out_the_mean_and_the_corners(tmp_path):
    spectra = {
        "frequency": [0.0, 0.25, 0.5, 0.6],
        "images": [9.0, 4.0, 2.0, 1.0],
        "reconstructions": [9.0, 3.0, 1.0, 0.5],
    }
    (tmp_path / "summary.json").write_text(json.dumps({"spectra": {"8": spectra}}))
    lines = save_spectra({"after": tmp_path}, 8, tmp_path / "spectra.png", images="real")
    assert lines == {"real": ([0.25, 0.5], [4.0, 2.0]), "after": ([0.25, 0.5], [3.0, 1.0])}
    with pytest.raises(DavaeError, match="no spectra at 16 px"):
        save_spectra({"after": tmp_path}, 16, tmp_path / "spectra.png")
