"""Schedule and losses of both official codes, number by number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from davae.diffusion import (
    FlowLoss,
    cosine_loss,
    detail_weight,
    min_snr_weight,
    sd3_sigma_table,
    structured_loss,
)
from davae.interop.official_sd3_transformer import from_official_order, load_transformer
from davae.latents import LatentLayout
from tests.conftest import ParityCase, load_case, parity_cases, relative_error

TOLERANCE = 1e-5
IMAGENET = pytest.mark.parametrize("path", parity_cases("loss_schedule", having="prediction"))
SD3 = pytest.mark.parametrize("path", parity_cases("loss_schedule", having="transformer_output"))
TABLE = pytest.mark.parametrize("path", parity_cases("loss_schedule", having="created_with_shift"))


class TestImageNet:
    @IMAGENET
    def test_path(self, path: Path) -> None:
        data = load_case(path).tensors
        t = data["t"].reshape(-1, 1, 1, 1)
        assert relative_error(t * data["data"] + (1 - t) * data["noise"], data["xt"]) < TOLERANCE
        assert relative_error(data["data"] - data["noise"], data["target"]) < TOLERANCE

    @IMAGENET
    def test_schedule_and_loss(self, path: Path) -> None:
        case = load_case(path)
        data = case.tensors
        for number, row in enumerate(case.info["rows"]):
            settings = row["settings"]
            layout = LatentLayout(
                settings["anchor_channel"], case.info["config"]["channels"] - settings["anchor_channel"]
            )
            for at in row["per_step"]:
                step = at["step"]
                tail = detail_weight(
                    step,
                    settings["end_step"] - settings["start_step"],
                    settings["end_weight"],
                    start_step=settings["start_step"],
                    start_weight=settings["start_weight"],
                    shape=settings["schedule"],
                )
                assert tail == pytest.approx(at["tail_weight"], rel=1e-5, abs=1e-12)
                # Switched off, the official schedule still computes a weight and does not use it.
                weight = tail / settings["base_weight"] if settings["enabled"] else 1.0
                each = structured_loss(data["prediction"], data["target"], layout, weight, reduction="none")
                assert relative_error(each, data[f"{number:02d}.loss_per_sample.step{step}"]) < TOLERANCE
                assert each.mean().item() == pytest.approx(at["loss"], rel=TOLERANCE)
                angle = cosine_loss(data["prediction"], data["target"])
                assert angle.item() == pytest.approx(at["cosine_loss"], rel=TOLERANCE)

    @IMAGENET
    def test_cosine_term(self, path: Path) -> None:
        data = load_case(path).tensors
        each = cosine_loss(data["prediction"], data["target"], reduction="none")
        assert relative_error(each, data["cosine_loss_map_mean_per_sample"]) < TOLERANCE

    @IMAGENET
    def test_whole_loss_in_the_sigma_convention(self, path: Path) -> None:
        # t = 1 - sigma and the opposite sign of the velocity: the loss is the same.
        case = load_case(path)
        data, channels = case.tensors, case.info["config"]["channels"]
        loss = FlowLoss(LatentLayout(channels // 4, channels - channels // 4), cosine_weight=1.0)(
            -data["prediction"],
            data=data["data"],
            noise=data["noise"],
            sigma=1 - data["t"],
            weight=1.0,
            reduction="none",
        )
        expected = data["loss_per_sample_unweighted"] + data["cosine_loss_map_mean_per_sample"]
        assert relative_error(loss, expected) < TOLERANCE


class TestSD3:
    @staticmethod
    def layout(case: ParityCase) -> LatentLayout:
        config = case.info["config"]
        return LatentLayout(config["base_channels"], config["total_channels"] - config["base_channels"])

    def base_first(self, case: ParityCase, name: str) -> Tensor:
        order = "detail_first" if case.info["config"]["reverse"] else "base_first"
        return from_official_order(case.tensors[name], self.layout(case), order)

    @SD3
    def test_noise_levels(self, path: Path) -> None:
        case = load_case(path)
        settings = case.info["config"]["scheduler"]
        table = sd3_sigma_table(settings["config_shift"], settings["train_shift"], settings["num_train_timesteps"])
        sigmas, timesteps = table.look_up(case.tensors["u"])
        assert relative_error(sigmas, case.tensors["sigmas"]) < TOLERANCE
        assert torch.equal(timesteps, case.tensors["timesteps"].long())

    @SD3
    @torch.no_grad()
    def test_prediction(self, path: Path) -> None:
        case = load_case(path)
        data = case.tensors
        model, layout = load_transformer(case.state_dict(), case.info["config"]["transformer"])
        assert layout == self.layout(case)
        sigma = data["sigmas"].reshape(-1, 1, 1, 1)
        noisy = torch.lerp(self.base_first(case, "latents"), self.base_first(case, "noise"), sigma)
        assert relative_error(noisy, self.base_first(case, "noisy_latents")) < TOLERANCE
        output = model(
            noisy,
            encoder_hidden_states=data["encoder_hidden_states"],
            pooled_projections=data["pooled_projections"],
            timestep=data["timesteps"],
        ).sample
        assert relative_error(output, self.base_first(case, "transformer_output")) < TOLERANCE

    @SD3
    def test_loss(self, path: Path) -> None:
        case = load_case(path)
        config, data = case.info["config"], case.tensors
        gamma = config["min_snr_gamma"] if config["use_min_snr_gamma"] else None
        loss = FlowLoss(
            self.layout(case),
            form="x0" if config["precondition_outputs"] else "velocity",
            min_snr_gamma=gamma,
        )
        noise_share = data["timesteps"] / 1000
        if gamma is not None:
            assert relative_error(min_snr_weight(noise_share, gamma), data["sample_weight"]) < TOLERANCE
        for row in case.info["rows"]:
            weight = detail_weight(row["step"], config["residual_warmup_steps"], config["residual_schedule_end_weight"])
            assert weight == pytest.approx(row["residual_weight"], rel=1e-5, abs=1e-12)
            each = loss(
                self.base_first(case, "transformer_output"),
                data=self.base_first(case, "latents"),
                noise=self.base_first(case, "noise"),
                sigma=data["sigmas"],
                noise_share=noise_share,
                weight=weight,
                reduction="none",
            )
            assert relative_error(each, data[f"per_sample_loss.step{row['step']}"]) < TOLERANCE
            assert each.mean().item() == pytest.approx(row["loss"], rel=TOLERANCE)


@TABLE
def test_sigma_table(path: Path) -> None:
    case = load_case(path)
    config = case.info["config"]
    for steps in config["steps"]:
        table = sd3_sigma_table(config["created_with_shift"], config["set_shift"], steps)
        expected = case.tensors[f"sigmas_{steps}"]
        assert expected[-1] == 0  # the end of sampling, which training never draws
        assert relative_error(table.sigmas, expected[:-1]) < TOLERANCE
        assert relative_error(table.timesteps, case.tensors[f"timesteps_{steps}"]) < TOLERANCE
