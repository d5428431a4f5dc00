"""Recording the contents of a report, and its pictures, during a run."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from davae.errors import DavaeError
from davae.evaluation import linear_probe_accuracy, project_latents, radial_power_spectrum
from davae.evaluation.metrics.names import SHIPPED
from davae.evaluation.reconstruction.crops import busiest_crop
from davae.report.schema import TENSOR_FILE, Curve, Figures, LatentMap, Picture, PictureRow, Section, Spectrum
from davae.report.words import capitalised
from davae.runtime.pictures import as_picture, save_image
from davae.runtime.resizing import upscaled
from davae.runtime.weight_files import atomic_tensors

STAGES = (
    Curve(
        title="Autoencoder stage",
        file="autoencoder/metrics.jsonl",
        text="The detail encoder and the joint decoder learn; the base autoencoder is frozen.",
    ),
    Curve(
        title="Diffusion stage",
        file="diffusion/metrics.jsonl",
        text="The widened transformer learns to predict the detail channels beside the base ones.",
    ),
)
"""The two stages of the method, with the demo's metrics files."""


class FigureRecorder:
    """Collects pictures, latent maps and spectra of a run; :meth:`write` saves them to its directory.

    Args:
        run_dir: the run directory; created if absent.
        classes: class names, in the order of the labels.
        curves: losses to draw.
    """

    def __init__(self, run_dir: Path | str, *, classes: Sequence[str] = (), curves: Sequence[Curve] = STAGES) -> None:
        self.run_dir = Path(run_dir)
        self.classes = list(classes)
        self.curves = list(curves)
        self._sections: list[Section] = []
        self._maps: list[LatentMap] = []
        self._map_method = "PCA"
        self._spectra: list[Spectrum] = []
        self._tensors: dict[str, Tensor] = {}

    def add_comparison(
        self,
        section_id: str,
        *,
        title: str,
        text: str,
        columns: Mapping[str, Tensor],
        captions: Sequence[str] | None = None,
        zoom: int | None = None,
        zoom_from: str | None = None,
        slider: tuple[str, str] | None = None,
    ) -> None:
        """Add a section with the same pictures from several sources side by side.

        Args:
            section_id: lower-case name, part of file names and of the section's anchor in the page.
            title: heading.
            text: what to look at.
            columns: label to images [N, 3, h, w] in [-1, 1]. Smaller ones are upscaled to the largest.
            captions: one per row.
            zoom: side of a magnified part in pixels; None for none.
            zoom_from: label of the column whose busiest part is magnified in all; the first by default.
            slider: labels of two columns that the reader can slide over each other.

        Raises:
            DavaeError: there are no columns, or the lengths of columns and captions differ.
        """
        if not columns:
            raise DavaeError(f"section {section_id!r} was given no columns")
        count = len(next(iter(columns.values())))
        captions = list(captions) if captions is not None else [""] * count
        lengths = {label: len(images) for label, images in columns.items()} | {"captions": len(captions)}
        if len(set(lengths.values())) != 1:
            raise DavaeError(f"section {section_id!r}: one length is needed, got {lengths}")
        height = max(images.shape[-2] for images in columns.values())
        width = max(images.shape[-1] for images in columns.values())
        full = {label: enlarged(images, height, width) for label, images in columns.items()}
        rows = []
        for i, caption in enumerate(captions):
            crop = busiest_crop(full[zoom_from or next(iter(full))][i], zoom) if zoom else None
            pictures, zooms = [], []
            for j, (label, images) in enumerate(full.items()):
                alt = f"{caption}: {label}" if caption else label
                name = f"figures/{section_id}-{i:02d}-{j}"
                save_png(images[i], self.run_dir / f"{name}.png")
                pictures.append(Picture(file=f"{name}.png", alt=alt, label=label))
                if crop is not None:
                    save_png(images[i][:, crop[0], crop[1]], self.run_dir / f"{name}-zoom.png")
                    zooms.append(Picture(file=f"{name}-zoom.png", alt=f"{alt}, a magnified part"))
            rows.append(PictureRow(caption=caption, pictures=pictures, zooms=zooms))
        places = None if slider is None else (list(full).index(slider[0]), list(full).index(slider[1]))
        self._sections.append(Section(id=section_id, title=title, text=text, rows=rows, slider=places))

    def add_reconstructions(
        self,
        images: Tensor,
        base_previews: Tensor,
        reconstructions: Tensor,
        captions: Sequence[str],
        *,
        alone: Tensor | None = None,
        others: Mapping[str, Tensor] | None = None,
        native: Tensor | None = None,
    ) -> None:
        """Add input, preview of the base, and reconstruction, side by side with a magnified part.

        Args:
            images: [N, 3, H, W] in [-1, 1], held out of the training.
            base_previews: [N, 3, h, w], decoded from the base latent (``decode_base``).
            reconstructions: [N, 3, H, W].
            captions: one per image.
            alone: [N, 3, H, W], of the joint decoder without details.
            others: [N, 3, H, W], of further ways by name: the upgrade that comes with davae, upscalers.
            native: [N, 3, H, W], of the base at full resolution.
        """
        columns = {"Input": images, "Base, enlarged": base_previews}
        columns |= {} if alone is None else {"Decoder alone": alone}
        columns["Upgraded"] = reconstructions
        columns |= _titled(others)
        between = "" if alone is None else "the next is what the upgrade's decoder makes of the same without details; "
        last = "" if native is None else " The last column is the base at full size, from more positions."
        self.add_comparison(
            "reconstruction",
            title="Reconstruction",
            text="Held-out images, never seen in training. The second column is what the frozen base "
            f"autoencoder keeps, enlarged; {between}the upgraded one adds the detail channels. All come from the "
            f"same latent grid.{_further(others)}{last} Look at the magnified squares: the upgrade should bring back "
            "lines and grain that the base has lost, without inventing others.",
            columns=columns | ({} if native is None else {"Base at full size": native}),
            captions=captions,
            zoom=max(images.shape[-1] // 4, 8),
            slider=("Base, enlarged", "Upgraded"),
        )

    def add_samples(
        self,
        base: Tensor,
        upgraded: Tensor,
        captions: Sequence[str],
        *,
        alone: Tensor | None = None,
        others: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add samples of the base, enlarged, beside those of the upgraded pipeline from the same seeds.

        Args:
            base: [N, 3, h, w] in [-1, 1].
            upgraded: [N, 3, H, W].
            captions: one per sample, such as its class and seed.
            alone: [N, 3, H, W], the base's samples decoded by the joint decoder without details.
            others: [N, 3, H, W], of further ways by name: the upgrade that comes with davae, upscalers.
        """
        columns = {"Base, enlarged": base} | ({} if alone is None else {"Decoder alone": alone})
        between = "" if alone is None else "then the same sample, decoded by the upgrade's decoder without details; "
        self.add_comparison(
            "samples",
            title="Samples",
            text="Generated from the same seeds with the same number of tokens. Left, the base's sample, "
            f"enlarged; {between}then the upgraded pipeline's, which generates the detail channels as well. The "
            "scene stays about the same, or changes where tuning moved the base; edges and textures become "
            f"finer.{_further(others)}",
            columns={**columns, "Upgraded": upgraded} | _titled(others),
            captions=captions,
            zoom=max(upgraded.shape[-1] // 4, 8),
            zoom_from="Upgraded",
            slider=("Base, enlarged", "Upgraded"),
        )

    def add_latents(
        self, base: Tensor, detail: Tensor, labels: Tensor, *, method: Literal["pca", "tsne"] = "pca", seed: int = 0
    ) -> dict[str, float]:
        """Add two-dimensional maps of base and detail latents, and their radial spectra.

        Args:
            base: [N, C, h, w].
            detail: [N, D, h, w] of the same images.
            labels: [N], indices into the classes.
            method: of the maps.
            seed: of the probe's split and of t-SNE.

        Returns:
            ``linear_probe_base`` and ``linear_probe_detail``, held-out accuracies of a linear probe.
        """
        if len(self.classes) <= int(labels.max()):
            raise DavaeError(f"label {int(labels.max())} has no name: there are {len(self.classes)} classes")
        self._map_method = {"pca": "PCA", "tsne": "t-SNE"}[method]
        self._tensors["labels"] = labels.detach().cpu().long().contiguous()
        probes = {}
        for key, title, latents in (("base", "Base latents", base), ("detail", "Detail latents", detail)):
            accuracy = linear_probe_accuracy(latents, labels, seed=seed)
            probes[f"linear_probe_{key}"] = accuracy
            self._tensors[f"map.{key}"] = project_latents(latents, method, seed=seed).contiguous()
            note = f"A linear probe names the class of {accuracy:.0%} of held-out latents."
            self._maps.append(LatentMap(title=title, key=f"map.{key}", note=note))
        self.add_spectra("latents", {"Base latents": base, "Detail latents": detail})
        return probes

    def add_spectra(self, group: Literal["images", "latents"], sets: Mapping[str, Tensor]) -> None:
        """Add radial power spectra, one line per set.

        Args:
            group: lines of one group share a plot.
            sets: label to images or latents [N, C, H, W]; images of one group should have one size.
        """
        for label, x in sets.items():
            key = f"{group}-{sum(s.group == group for s in self._spectra)}"
            frequency, power = radial_power_spectrum(x)
            self._tensors[f"frequency.{key}"] = frequency.float().contiguous()
            self._tensors[f"power.{key}"] = power.float().contiguous()
            self._spectra.append(Spectrum(label=label, group=group, key=key))

    def write(self) -> Figures:
        """Write ``figures.json`` and ``figures.safetensors``; the pictures are already written."""
        atomic_tensors(self.run_dir / TENSOR_FILE, self._tensors or {"labels": torch.zeros(0, dtype=torch.long)})
        figures = Figures(
            sections=self._sections,
            curves=self.curves,
            classes=self.classes,
            maps=self._maps,
            map_method=self._map_method,
            spectra=self._spectra,
        )
        figures.write(self.run_dir)
        return figures


def _titled(others: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    return {capitalised(name): made for name, made in (others or {}).items()}


def _further(others: Mapping[str, Tensor] | None) -> str:
    """What further columns show, in sentences."""
    told = {name: f"is the base's image, enlarged by {name}" for name in others or {}}
    if SHIPPED in told:
        told[SHIPPED] = "comes with davae (tiny-upgraded), trained by the same recipe for longer"
    return "".join(f" The column {capitalised(name)} {meaning}." for name, meaning in told.items())


_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def save_png(image: Tensor, path: Path) -> Path:
    """Write one image [3, H, W] or [1, H, W] in [-1, 1]; values outside are clipped."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise DavaeError(f"a picture must be [3, H, W] or [1, H, W] in [-1, 1], got {list(image.shape)}")
    if not image.isfinite().all():
        raise DavaeError(f"the picture for {path.name} holds NaN or infinite values")
    save_image(as_picture(image), path, optimize=True)
    return path


def enlarged(images: Tensor, height: int, width: int) -> Tensor:
    """Upscale images ``[B, 3, h, w]`` in [-1, 1] to ``[B, 3, height, width]``; equal sizes are unchanged."""
    images = images.detach().float()
    return images if images.shape[-2:] == (height, width) else upscaled(images, (height, width))


def data_uri(run_dir: Path, file: str) -> str:
    """A PNG of the run directory as a ``data:`` URI.

    Raises:
        DavaeError: the file is absent, lies outside the run directory or is not a PNG.
    """
    path = (run_dir / file).resolve()
    if not path.is_relative_to(run_dir.resolve()):
        raise DavaeError(f"the picture {file!r} lies outside the run directory {run_dir}")
    if not path.is_file():
        raise DavaeError(f"the picture {file!r} is missing from {run_dir}: run the demo again")
    content = path.read_bytes()
    if not content.startswith(_PNG_SIGNATURE):
        raise DavaeError(f"the picture {file!r} in {run_dir} is not a PNG file")
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
