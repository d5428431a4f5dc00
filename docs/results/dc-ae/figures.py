"""The curves and tables of docs/dc-ae.md from the runs that run.sh made: ``figures.py RUNS OUT``."""

import json
import sys
from pathlib import Path

from curves import save_curves, save_spectra

runs, out = Path(sys.argv[1]), Path(sys.argv[2])
F64 = {
    "DC-AE": "dc-ae-small-f64",
    "DC-AE without residual autoencoding": "dc-ae-small-f64-plain",
    "SD-VAE": "sd-vae-small-f64",
}
PHASES = {f"after phase {n}": runs / f"f32-phase{n}" for n in (1, 2, 3)}

save_curves(
    {name: runs / folder for name, folder in F64.items()},
    "psnr_128",
    out / "f64-psnr.png",
    label="PSNR of held-out photographs, dB",
)
save_spectra(PHASES, 128, out / "spectra-128px.png", images="photographs")


def _digest(folder: Path) -> dict:
    """A run's summary without spectra, hashes cut to twelve digits."""
    summary = json.loads((folder / "summary.json").read_text())
    del summary["spectra"], summary["start"]
    for layer in summary["layers"].values():
        layer["before"], layer["after"] = layer["before"][:12], layer["after"][:12]
    return summary


folders = [*F64.values(), *(p.name for p in PHASES.values()), "f32-phase2-at-128px"]
table = {folder: _digest(runs / folder) for folder in folders}
(out / "figures.json").write_text(json.dumps(table, indent=1))
