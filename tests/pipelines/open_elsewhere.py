"""Run in a process of its own: open saved pipelines as a stranger would, and keep the pixels they make.

    python open_elsewhere.py FOLDER (with | without)

FOLDER holds pipelines and ``calls.json``, the arguments of a call for each. "without" makes `import davae` impossible.
"""

import json
import sys
from pathlib import Path

folder, mode = Path(sys.argv[1]), sys.argv[2]


class NoDavae:
    """Stands before every other finder, that of an editable installation included."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "davae":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


if mode == "without":
    sys.meta_path.insert(0, NoDavae())
else:
    import davae

import torch  # noqa: E402
from diffusers import AutoModel, DiffusionPipeline  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def pixels(pipe: DiffusionPipeline, arguments: dict) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    made = pipe(**arguments, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
    return torch.as_tensor(made).contiguous()


calls = json.loads((folder / "calls.json").read_text())
made = {}
for name, arguments in calls.items():
    options = {}
    if mode == "without":
        options["trust_remote_code"] = True
        if (folder / name / "pipeline.py").is_file():
            options["custom_pipeline"] = "pipeline"
    made[name] = pixels(DiffusionPipeline.from_pretrained(folder / name, **options), arguments)

if mode == "with":
    full = calls["lumina2"] | {side: 2 * calls["lumina2"][side] for side in ("height", "width")}
    made["lumina2 by davae"] = pixels(davae.load_pipeline(folder / "lumina2"), full)
else:
    try:
        DiffusionPipeline.from_pretrained(folder / "sd3")
        refusal = "none: the folder's code was run without consent"
    except ValueError as error:
        refusal = str(error)
    assert "trust_remote_code=True" in refusal

    vae = AutoModel.from_pretrained(str(folder / "sd3" / "vae"), trust_remote_code=True)
    made["vae"] = vae(torch.linspace(-1, 1, 12288).view(1, 3, 64, 64)).sample.detach()

    # What a stranger saves again opens again; and a file of another version does not disturb the classes in use.
    pipe = DiffusionPipeline.from_pretrained(folder / "sd3", trust_remote_code=True)
    pipe.save_pretrained(folder / "again")
    code = folder / "again" / "vae" / "davae.py"
    assert code.read_text() == (folder / "sd3" / "vae" / "davae.py").read_text()
    code.write_text(code.read_text() + "\nDETAIL_STD = None\n")
    again = DiffusionPipeline.from_pretrained(folder / "again", trust_remote_code=True)
    assert type(again.vae) is not type(pipe.vae)
    assert type(pipe.vae) is type(vae)
    made["again"] = pixels(again, calls["sd3"])
    assert not [name for name in sys.modules if name.partition(".")[0] == "davae"]

save_file(made, folder / f"{mode}.safetensors")
