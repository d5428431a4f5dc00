"""The three phases as runs: each starts from the previous result and verifies that frozen layers did not change."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL

from davae.data import ItemDataset
from davae.data.cache import value_hash
from davae.data.in_memory import ImagesInMemory, MixedScales
from davae.errors import DavaeError
from davae.evaluation.metrics.names import current_names
from davae.models.dc_ae import DeepAutoencoder, PlainAutoencoderDC
from davae.recipes.checks import check_backbones, check_settings
from davae.recipes.data import DataSettings, is_procedural
from davae.recipes.dc_ae import DcAeRecipe, Phase
from davae.recipes.read import differing_keys, dump_recipe, load_recipe
from davae.runtime.atomic_files import atomic_json
from davae.runtime.model_files import open_model
from davae.runtime.processes import everyone, is_first, loader_workers, start_processes
from davae.runtime.resizing import reduced_to
from davae.runtime.text_files import read_object
from davae.training.checkpoints.foundations import model_hash
from davae.training.checkpoints.run_directory import RunDirectory, data_facts
from davae.training.data import check_images, open_part
from davae.training.dc_ae.stage import DcAeStage, build_autoencoder, trained_layers
from davae.training.loop.loop import TrainResult, figures_line, train

_CLASSES = {c.__name__: c for c in (AutoencoderDC, PlainAutoencoderDC, AutoencoderKL)}
_MEASURED = {"scaling_factor", "shift_factor"}  # config entries that training sets


def run_dc_ae(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    *,
    phase: int,
    start: Path | None = None,
    dry_run: bool = False,
) -> str:
    """Train one phase of a recipe; returns a summary to print.

    Args:
        recipe: name or YAML file of a recipe with ``kind: dc-ae``.
        overrides: ``section.key=value``.
        out: run directory; ``runs/RECIPE-phaseN`` by default.
        phase: 1, 2 or 3.
        start: run directory or autoencoder folder that phase 2 or 3 starts from; by default the default run
            directory of the previous phase.
        dry_run: only return the resolved recipe, with sizes counted on the meta device.

    Raises:
        DavaeError: the recipe is wrong, or the result of the previous phase is missing or does not fit.
    """
    settings = load_recipe(recipe, overrides)
    if not isinstance(settings, DcAeRecipe):
        raise DavaeError(f"recipe '{recipe}' is of kind '{settings.kind}'; `davae train dc-ae` needs kind: dc-ae")
    find_phase(settings, phase)
    stem = Path(recipe).stem
    if start is None and phase > 1:
        start = Path("runs") / f"{stem}-phase{phase - 1}"
    out = out or Path("runs") / f"{stem}-phase{phase}"
    if not dry_run:
        RunDirectory(out, _plain(settings, phase, start))  # refuses other settings before images are opened
    _check(settings, phase, without_images=dry_run)
    if dry_run:
        return f"{dump_recipe(settings)}{_counted(settings, phase)}"
    if phase > 1 and not (start_folder(start) / "config.json").is_file():
        raise DavaeError(
            f"phase {phase} starts from phase {phase - 1}'s result, and there is none in {start}: run "
            f"`davae train dc-ae --recipe {recipe} --phase {phase - 1}` to its end first, or name one with --from"
        )
    result = train_dc_ae(settings, out, phase=phase, start=start)
    figures = figures_line(result.metrics)
    return f"{result.result}\n{figures}"


def _check(recipe: DcAeRecipe, phase: int, *, without_images: bool) -> None:
    """Check a phase's settings and images before training; in a dry run images may be missing."""
    settings = find_phase(recipe, phase)
    check_settings(recipe, f"phase{phase}")
    if not without_images:
        check_backbones(recipe, f"phase{phase}")
    sides = {(settings.path, settings.windows_from or settings.resolution)}
    for path, side in sides | {(recipe.measure.path, recipe.measure.resolutions[0])}:
        data = _data(recipe, path, side)
        if not without_images or is_procedural(data.path) or Path(data.path).expanduser().exists():
            check_images(data)


def train_dc_ae(recipe: DcAeRecipe, out: Path, *, phase: int, start: Path | None = None) -> TrainResult:
    """Train one phase into ``out/autoencoder``; continues from the newest checkpoint in ``out``.

    ``out/summary.json`` holds the metrics before and after, the spectra, and a hash of every layer before and
    after; the hashes of frozen layers are equal.

    Args:
        recipe: the whole recipe.
        out: run directory.
        phase: 1, 2 or 3.
        start: run directory or autoencoder folder of the previous phase; ``None`` for phase 1.

    Raises:
        DavaeError: ``start`` is missing, or of another phase or network.
        RuntimeError: a frozen layer changed, which is a bug.
    """
    settings = find_phase(recipe, phase)
    plain = _plain(recipe, phase, start)
    directory = RunDirectory(out, plain)
    torch.manual_seed(settings.loop.seed)
    autoencoder = _initial(recipe, phase, start)
    before = layer_hashes(autoencoder)
    given = model_hash(autoencoder)
    learns = {id(p) for layer in trained_layers(autoencoder, settings) for p in layer.parameters()}
    trained = {_layer(n) for n, p in autoencoder.named_parameters() if id(p) in learns}

    stage = DcAeStage(
        autoencoder,
        settings,
        training_images(recipe, settings),
        measured_images(recipe),
        prefixes=recipe.measure.prefixes,
        scaling_images=recipe.measure.scaling_images,
        workers=loader_workers(recipe.data.workers),
    )
    stage.section, stage.timeout_s = f"phase{phase}", recipe.data.timeout_s
    if start is not None:
        stage.foundations = {**stage.foundations, "the autoencoder of the phase before": given}
    stage.facts = data_facts(_data(recipe, settings.path, settings.resolution), stage.dataset)
    figures_before = _measured_before(stage, directory, given)
    result = train(stage, out, plain)
    assert result is not None

    after = layer_hashes(load_autoencoder(result.result))
    touched = sorted(name for name in before if before[name] != after[name] and name not in trained)
    if touched:
        raise RuntimeError(f"phase {phase} changed layers that it does not train: {', '.join(touched)}")
    summary = {
        "phase": phase,
        "start": plain["start"],
        "scaling_factor": autoencoder.config.scaling_factor,
        "parameters": sum(p.numel() for p in autoencoder.parameters()),
        "trained_parameters": sum(p.numel() for p in autoencoder.parameters() if p.requires_grad),
        "before": figures_before,
        "after": result.metrics,
        "layers": {name: {"trained": name in trained, "before": before[name], "after": after[name]} for name in before},
        "spectra": stage.spectra,
    }
    if is_first():
        atomic_json(out / "summary.json", summary)
    return result


def _plain(recipe: DcAeRecipe, phase: int, start: Path | None) -> dict[str, Any]:
    """What the run of a phase stores as its recipe; the other phases may change without making it another run."""
    plain = recipe.model_dump(mode="json", exclude={f"phase{n}" for n in (1, 2, 3) if n != phase})
    return plain | {"phase": phase, "start": None if start is None else str(start)}


def find_phase(recipe: DcAeRecipe, phase: int) -> Phase:
    """The settings of phase 1, 2 or 3.

    Raises:
        DavaeError: there is no such phase, or the recipe has no section for it.
    """
    if phase not in (1, 2, 3):
        raise DavaeError(f"there is no phase {phase}: phases are 1 (everything), 2 (latent) and 3 (head)")
    found: Phase | None = (recipe.phase1, recipe.phase2, recipe.phase3)[phase - 1]
    if found is None:
        raise DavaeError(f"the recipe has no section phase{phase}; add one, or skip the phase")
    return found


def start_folder(start: Path | None) -> Path:
    """The autoencoder's folder, from that folder or from its run directory."""
    if start is None:
        raise DavaeError("phases 2 and 3 start from the result of the previous phase; name its folder")
    return start / "autoencoder" if (start / "autoencoder").is_dir() else start


def load_autoencoder(folder: Path) -> DeepAutoencoder:
    """Load a trained autoencoder as the class that its config names.

    Raises:
        DavaeError: the folder holds no model, or one of another class.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise DavaeError(f"no trained autoencoder in {folder}: there is no config.json")
    name = read_object(config).get("_class_name")
    if name not in _CLASSES:
        raise DavaeError(f"{folder} holds a {name}; DC-AE training starts from {', '.join(_CLASSES)}")
    return open_model(_CLASSES[name].from_pretrained, folder)[0]


def layer_hashes(autoencoder: DeepAutoencoder) -> dict[str, str]:
    """SHA-256 of every layer's weights and buffers, by layer; a stage of the network counts as one layer."""
    digests: dict[str, Any] = {}
    for name, tensor in autoencoder.state_dict().items():
        digest = digests.setdefault(_layer(name), hashlib.sha256())
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _layer(name: str) -> str:
    """``encoder.down_blocks.2`` for ``encoder.down_blocks.2.0.conv1.weight``; ``encoder.conv_in`` for its bias."""
    parts = name.split(".")
    return ".".join(parts[: 3 if parts[2].isdigit() else 2])


def training_images(recipe: DcAeRecipe, phase: Phase) -> ItemDataset:
    """The training images of a phase: whole images, mixed with crops of larger ones if ``windows_from`` is set."""
    data = _data(recipe, phase.path, phase.windows_from or phase.resolution)
    images: ItemDataset = open_part(data, "train")
    if recipe.data.in_memory:
        images = ImagesInMemory(images)
    if phase.windows_from is None:
        return images
    return MixedScales(images, partial(reduced_to, side=phase.resolution), phase.windows, phase.loop.seed)


def measured_images(recipe: DcAeRecipe) -> dict[int, ItemDataset]:
    """Held-out images by measured resolution, in memory."""
    return {
        side: ImagesInMemory(open_part(_data(recipe, recipe.measure.path, side), "held_out"))
        for side in recipe.measure.resolutions
    }


def _data(recipe: DcAeRecipe, path: str | None, resolution: int) -> DataSettings:
    """The recipe's section at one resolution; its revision applies to the recipe's own path only."""
    data = recipe.data
    return DataSettings(
        path=path or data.path,
        revision=data.revision if path in (None, data.path) else None,
        crop=data.crop,
        flip=data.flip,
        split=data.split,
        hold_out=data.hold_out,
        resolution=resolution,
    )


def _initial(recipe: DcAeRecipe, phase: int, start: Path | None) -> DeepAutoencoder:
    """Random weights for phase 1; for the others the weights of the previous phase, checked to fit."""
    if phase == 1:
        if start is not None:
            raise DavaeError(f"phase 1 starts from random weights, not from {start}; leave --from out")
        return build_autoencoder(recipe.architecture)
    folder = start_folder(start)
    autoencoder = load_autoencoder(folder)
    summary = folder.parent / "summary.json"  # a published autoencoder has none and may be adapted
    if summary.is_file():
        made_by = read_object(summary).get("phase")
        if made_by != phase - 1:
            raise DavaeError(
                f"phase {phase} starts from phase {phase - 1}'s result, but {folder} comes from phase {made_by}"
            )
    with torch.device("meta"):
        expected = build_autoencoder(recipe.architecture)
    differing = differing_keys(_shape(expected), _shape(autoencoder))
    if differing:
        raise DavaeError(
            f"the autoencoder in {folder} is another network than the recipe's ({'; '.join(differing[:3])})"
        )
    return autoencoder


def _shape(autoencoder: DeepAutoencoder) -> dict[str, Any]:
    """The config entries that define the network, as plain values."""
    config = {k: v for k, v in autoencoder.config.items() if not k.startswith("_") and k not in _MEASURED}
    return json.loads(json.dumps({"class": type(autoencoder).__name__, **config}))


def _measured_before(stage: DcAeStage, directory: RunDirectory, given: str) -> dict[str, float]:
    """The figures of what the phase starts from, whose weights have the hash ``given``; measured once a run."""
    start_processes()
    with directory.locked() if is_first() else nullcontext():
        return _measured_or_known(stage, directory, given)


def _measured_or_known(stage: DcAeStage, directory: RunDirectory, given: str) -> dict[str, float]:
    if not stage.can_measure:
        return {}
    kept = directory.path / "before.json"
    made_of = value_hash([given, {side: images.sizes_by_name() for side, images in stage.held_out.items()}])
    known = everyone(_read_figures(kept, made_of))[0]  # what the first process sees
    if known is not None:
        return known
    if torch.accelerator.is_available():
        stage.objective.to(torch.accelerator.current_accelerator())
    figures = stage.validate(directory.samples, 0)
    if is_first():
        atomic_json(kept, {"made_of": made_of, "figures": figures})
    return figures


def _read_figures(file: Path, made_of: str) -> dict[str, float] | None:
    """Figures written before; none where they are of other weights or images, or a power cut damaged them."""
    try:
        found = read_object(file)
        return current_names(found["figures"]) if found["made_of"] == made_of else None
    except (DavaeError, KeyError):  # an earlier version did not note it
        return None


def _counted(recipe: DcAeRecipe, phase: int) -> str:
    """Parameter counts and latent size as YAML comments, from the meta device."""
    settings = find_phase(recipe, phase)
    with torch.device("meta"):
        autoencoder = build_autoencoder(recipe.architecture)
    whole = sum(p.numel() for p in autoencoder.parameters())
    learns = sum(p.numel() for layer in trained_layers(autoencoder, settings) for p in layer.parameters())
    side = settings.resolution // recipe.compression
    return (
        f"# {type(autoencoder).__name__}: {whole / 1e6:.1f} M parameters, phase {phase} trains {learns / 1e6:.1f} M\n"
        f"# {settings.resolution} px images, latent [{recipe.architecture.latent_channels}, {side}, {side}]"
    )
