"""Exporting a run's result to a folder that can be shared or published."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml

from davae.errors import DavaeError
from davae.interop.comfyui import write_single_files
from davae.models.portable import CODE_FILE
from davae.pipelines import Licence, Making, find_licence, push_to_hub, write_model_card
from davae.pipelines.saving.licence import read_front_matter
from davae.pipelines.saving.model_card import CARD
from davae.pipelines.saving.opening import LAYERS_FILE
from davae.pipelines.saving.publishing import copy_model, public_name
from davae.recipes.data import is_on_hub
from davae.runtime.atomic_files import copy_file
from davae.runtime.package_files import shipped
from davae.runtime.places import check_place, claim
from davae.runtime.text_files import read_object
from davae.training.checkpoints.run_directory import read_config, read_metrics

_PORTABLE_CLASSES = ("AutoencoderDA", "LightningDiTTransformer2DModel")
# Locations of a result in a run directory, or in one that holds the runs of both stages.
_PIPELINE = ("pipeline", "diffusion/pipeline")
_ADAPTERS = ("adapters", "diffusion/adapters")
_AUTOENCODER = ("autoencoder", "autoencoder/autoencoder")


Format = Literal["diffusers", "comfyui"]


def export_run(
    run: Path,
    out: Path,
    *,
    license: str | Licence | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    adapters: bool = False,
    format: Format = "diffusers",
    repo_id: str | None = None,
    private: bool | None = None,
) -> str:
    """Copy the result of a run, write its model card, and publish it if ``repo_id`` is given.

    The result is the merged pipeline, or the autoencoder of a run that trained only that. Only files that its class
    reads are copied, links are refused, and local paths are reduced to their last component.

    Args:
        run: a run directory of either stage, or one that holds both (such as the demo's); or the folder of an upgraded
            pipeline or of an autoencoder.
        out: a folder that does not exist or is empty.
        license: of the result; by default the base's own.
        license_name, license_link: of a licence that the hub has no id for, see
            :func:`davae.pipelines.saving.licence.find_licence`.
        adapters: export LoRA, widened layers and autoencoder instead of the merged pipeline.
        format: ``"comfyui"`` writes single files into folders that are named as those of ComfyUI's ``models``, see
            :mod:`davae.interop.comfyui`.
        repo_id: publish the folder under this name on the hub.
        private: visibility of a new repository.

    Returns:
        A message to print.

    Raises:
        DavaeError: the run has no such result or one that is a link, the licence is not known, or ``out`` holds files.
            Nothing is written then, nor where anything else goes wrong.
    """
    check_place(out, "result")
    result = _find_result(run, adapters=adapters)
    if format == "diffusers":
        _check_portable(result)
    stage = result.parent
    recipe = {} if result == run else _recipe(stage)
    base = str(recipe.get("base", "")) if recipe else _base_of(run)
    card_of = shipped(base) or (base if recipe else run)
    licence = find_licence(str(card_of), license, name=license_name, link=license_link)
    with claim(out, "result") as folder:
        name, files = repo_id or out.resolve().name, []
        if format == "comfyui":
            autoencoder = _autoencoder_of(stage, recipe) if adapters else None
            files = write_single_files(result, folder, Path(name).name, autoencoder=autoencoder)
        else:
            copy_model(result, folder)
            if adapters:
                copy_model(_autoencoder_of(stage, recipe), folder / "autoencoder")
        making = None
        if recipe:
            making = replace(_making(stage, recipe), pictures={} if files else _copy_samples(result, folder))
        card = write_model_card(
            result if files else folder,
            base_model=base,
            license=licence,
            making=making,
            name=name,
            files=files,
            out=folder,
        )
    message = f"{out}\nlicence {licence.title}, from {public_name(base)}; the card is {out / card.name}"
    message += "".join(f"\n{out / file}" for file in files)
    if repo_id is not None:
        message += f"\n{push_to_hub(out, repo_id, private=private)}"
    return message


def _base_of(folder: Path) -> str:
    """The base that the card of a folder names; the folder itself without one."""
    card = folder / CARD
    return str((read_front_matter(card) if card.is_file() else {}).get("base_model", folder))


def _copy_samples(result: Path, folder: Path) -> dict[str, str]:
    """Copy the last validation's samples of a transformer; those of an autoencoder show photographs.

    Returns:
        The name of the picture, with what it shows.
    """
    steps = {
        int(file.stem.removeprefix("step-")): file
        for file in (result.parent / "samples").glob("step-*.png")
        if file.stem.removeprefix("step-").isdecimal()
    }
    if not steps or result.name not in ("pipeline", "adapters"):
        return {}
    copy_file(steps[max(steps)], folder / "samples.png")
    return {"samples.png": f"samples of the last validation, at step {max(steps)}; the base's below"}


def _find_result(run: Path, *, adapters: bool) -> Path:
    places = _ADAPTERS if adapters else (*_PIPELINE, *_AUTOENCODER)
    itself = "model_index.json" if (run / "model_index.json").is_file() else "config.json"
    if not adapters and (run / itself).is_file():
        return run
    marks = (LAYERS_FILE,) if adapters else ("model_index.json", "config.json")
    for place in places:
        if any((run / place / mark).is_file() for mark in marks):
            return run / place
    what = "adapters" if adapters else "pipeline or autoencoder"
    raise DavaeError(f"{run} holds no {what}: looked for {', '.join(places)} in it. Is the run finished?")


def _check_portable(result: Path) -> None:
    """Check that the result can be opened without davae: each component that needs code has it in its folder."""
    for config in filter(Path.is_file, (result / "config.json", *result.glob("*/config.json"))):
        ours = _json(config).get("_class_name") in _PORTABLE_CLASSES
        if ours and not (config.parent / CODE_FILE).is_file():
            raise DavaeError(
                f"{config.parent} was saved by an older davae, without {CODE_FILE}: open it with from_pretrained "
                "and save it again with save_pretrained"
            )


def _recipe(stage: Path) -> dict[str, Any]:
    file = stage / "config.yaml"
    if not file.is_file():
        raise DavaeError(f"{stage} is not a run directory: it has no config.yaml, which names the base")
    recipe = read_config(file)
    if recipe is None:
        raise DavaeError(f"{file} is damaged: remove it and run the training's command again, which rewrites it")
    return recipe


def _autoencoder_of(stage: Path, recipe: dict[str, Any]) -> Path:
    for folder in (stage / "pipeline" / "vae", Path(recipe.get("autoencoder_folder", ""))):
        if _json(folder / "config.json").get("_class_name") == "AutoencoderDA":
            return folder
    raise DavaeError(f"the autoencoder that belongs to the adapters in {stage} no longer exists")


def _making(stage: Path, recipe: dict[str, Any]) -> Making:
    environment = _json(stage / "environment.json")
    packages = environment.get("packages", {})
    hardware = {name: packages[name] for name in ("torch", "diffusers", "peft") if name in packages}
    if environment.get("device"):
        hardware["on"] = environment["device"]
    summary = _json(stage / "summary.json") or _json(stage.parent / "summary.json")
    sections = {key: value for key, value in summary.items() if key not in ("hardware", "title", "created")}
    commands = [str(summary["command"])] if "command" in summary else _commands(stage, recipe)
    own = {key: value for key, value in recipe.items() if key != "autoencoder_folder"}
    data = recipe.get("data") or {}
    names = [str(images.get("path", "")) for images in (data, *data.get("more", ()))]
    return Making(
        figures=sections or _last_figures(stage),
        commands=commands,
        hardware=hardware,
        datasets=[name for name in names if is_on_hub(name)],
        recipe=yaml.safe_dump(own, sort_keys=False),
    )


def _commands(stage: Path, recipe: dict[str, Any]) -> list[str]:
    """The commands of the run, preceded by that of its autoencoder's run if it still exists."""
    first = Path(recipe["autoencoder_folder"]).parent if recipe.get("autoencoder_folder") else None
    runs = [first, stage] if first is not None else [stage]
    found = [_json(run / "environment.json").get("command") for run in runs]
    return [command for command in found if command]


def _last_figures(stage: Path) -> dict[str, float]:
    """The latest held-out metrics, with their step; empty if there are none."""
    for line in reversed(read_metrics(stage / "metrics.jsonl")):
        found = {key: value for key, value in line.items() if key not in ("step", "time", "detail_weight")}
        if any(key.startswith("held_out") or key == "psnr" for key in found):
            return {"step": line["step"], **found}
    return {}


def _json(file: Path) -> dict[str, Any]:
    """A JSON file of a run or of its result; an empty dictionary if it does not exist."""
    try:
        return read_object(file) if file.is_file() else {}
    except DavaeError as error:
        raise DavaeError(f"{file} is damaged ({error}): run the training's command again, which rewrites it") from error
