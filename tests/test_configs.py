"""The launch configurations are ones that accelerate reads, and say what they are called."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

CONFIGS = Path(__file__).parents[1] / "configs" / "accelerate"


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
