"""The launch configurations are ones that accelerate reads, say what they are called, and come with the package."""

from importlib import resources
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from davae.errors import DavaeError
from davae.runtime.package_files import write_package_files

CONFIGS = Path(str(resources.files("davae.configs"))) / "accelerate"


@pytest.mark.parametrize(
    ("name", "kind", "processes", "machines"),
    [
        ("one-gpu", "NO", 1, 1),
        ("eight-gpus", "MULTI_GPU", 8, 1),
        ("two-nodes", "MULTI_GPU", 16, 2),
        ("fsdp2", "FSDP", 8, 1),
        ("fsdp2-zero2", "FSDP", 8, 1),
    ],
)
def test_accelerate_reads_the_configurations(name, kind, processes, machines):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes, config.num_machines) == (kind, processes, machines)
    assert config.mixed_precision == "no"  # the recipe decides


def test_every_configuration_is_tested():
    assert len(list(CONFIGS.glob("*.yaml"))) == 5


def test_they_are_written_where_the_documentation_names_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = write_package_files("configs", "configs", (".yaml", ".sbatch"))
    names = ["eight-gpus", "fsdp2-zero2", "fsdp2", "one-gpu", "two-nodes"]
    assert written == [*(Path(f"configs/accelerate/{n}.yaml") for n in names), Path("configs/slurm/train.sbatch")]
    for file in written:
        assert file.read_bytes() == (CONFIGS.parent / file.relative_to("configs")).read_bytes()
        assert f"{file}" in file.read_text(encoding="utf-8")  # the command that uses it
    with pytest.raises(DavaeError, match="is not empty"):
        write_package_files("configs", "configs", (".yaml", ".sbatch"))


def test_the_nodes_for_comfyui_are_written_whole(tmp_path):
    source = Path(str(resources.files("davae"))) / "comfyui" / "custom_node"
    written = write_package_files(
        "comfyui/custom_node", tmp_path / "custom_nodes/davae", (".py", ".json", ".md", ".toml")
    )
    for file in written:
        assert file.read_bytes() == (source / file.relative_to(tmp_path / "custom_nodes/davae")).read_bytes()
    names = {str(file.relative_to(source)) for file in source.rglob("*") if file.is_file() and file.suffix != ".pyc"}
    assert {str(file.relative_to(tmp_path / "custom_nodes/davae")) for file in written} == names
    assert "example_workflows/api/text_to_image.json" in names
