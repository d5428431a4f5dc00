"""The planner's memory of each phase."""

from davae.planner.phases import Phase
from davae.planner.recipes import plan_upgrade


def test_the_phases_of_a_small_recipe() -> None:
    made = plan_upgrade(recipe="debug-text", overrides=["diffusion.tune.mode=lora", "data.resolution=64"])
    assert list(made.phases) == ["autoencoder", "cache", "diffusion"]
    assert list(made.phases["diffusion"]) == ["start", "step", "validation", "export"]
    assert made.phases["diffusion"]["step"].device == made.memory_parts["diffusion"]
    assert "autoencoder" not in made.phases["diffusion"]["step"].device  # it rests in main memory
    assert set(made.phases["cache"]["text"].device) == {"text encoders", "activations"}
    found = made.to_json()["phases"]["diffusion"]["validation"]
    assert found["device_bytes"] == sum(found["device"].values()) > 0


def test_a_phase_adds_up() -> None:
    phase = Phase({"a": 3, "b": 4}, {"program": 10}, {"copy": 5})
    assert (phase.device_bytes, phase.host_bytes, phase.together) == (7, 15, 17)
    assert phase.to_json()["host"] == {"program": 10, "copy": 5}


def test_moments_of_a_phase_need_not_be_largest_together() -> None:
    text, images = Phase({"encoders": 12}, {"program": 1}), Phase({"autoencoder": 3}, {"program": 1, "encoders": 11})
    both = Phase.of_moments(text, images)
    assert (both.device_bytes, both.host_bytes, both.together) == (12, 12, 15)
    assert both.to_json()["device"] == {"encoders": 12}


def test_more_pixels_change_validation() -> None:
    small, large = (plan_upgrade(recipe="debug", overrides=[f"data.resolution={side}"]).phases for side in (64, 128))
    for stage in ("autoencoder", "diffusion"):
        assert large[stage]["validation"].device_bytes > small[stage]["validation"].device_bytes
