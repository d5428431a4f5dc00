"""DeepSpeed's ZeRO-2: weights whole in every process, gradients and moments spread over all.

The engine reduces gradients into one flat piece for each process and group of parameters; a trained parameter that lies
in this process's piece, or reaches into it, has a *fragment* there. Everything between backward and step is done on
fragments, and figures of whole tensors are sums over the processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.recipes.loop import LoopSettings
from davae.training.deepspeed_settings import engine_settings
from davae.training.learner import Learner
from davae.training.module_state import restore_module
from davae.training.sharding import make_contiguous
from davae.training.stage import Player

MOMENTS = ("exp_avg", "exp_avg_sq")


class _InAutocast(nn.Module):
    """The player's step with the training's precision; the engine turns off what is set around it."""

    def __init__(self, accelerator: Accelerator, module: nn.Module) -> None:
        super().__init__()
        self.accelerator, self.module = accelerator, module

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        with self.accelerator.autocast():
            losses: dict[str, Tensor] = self.module(batch, step)
        return losses


class ZeroLearner(Learner):
    """A player whose gradients and moments DeepSpeed spreads over the processes.

    Args:
        accelerator: of the training, started as for DDP.
        loop: its settings.
        player: whose.
        optimizer: AdamW over the player's trained parameters.

    Raises:
        DavaeError: the configuration or the recipe asks for what ZeRO-2 does not do here.
    """

    def __init__(
        self, accelerator: Accelerator, loop: LoopSettings, player: Player, optimizer: torch.optim.Optimizer
    ) -> None:
        if not isinstance(optimizer, torch.optim.AdamW):
            raise DavaeError(
                f"{player.name}: optimizer.kind={player.optimizer.kind} cannot keep moments that are spread over "
                "processes (DeepSpeed): set optimizer.kind=adamw"
            )
        settings = engine_settings(loop, accelerator.num_processes)
        make_contiguous(player.module)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        engine, zero, _, _ = deepspeed.initialize(
            model=_InAutocast(accelerator, player.module), optimizer=optimizer, config=settings
        )
        super().__init__(accelerator, loop, player, engine, zero)

    def zero_grad(self) -> None:
        """Nothing: the engine's step has done it."""

    def losses(self, batch: dict[str, Any], step: int, *, last: bool) -> dict[str, Tensor]:
        """Named losses of a micro-step, among them ``total``."""
        self.module.set_gradient_accumulation_boundary(last)
        losses: dict[str, Tensor] = self.module(batch, step)
        return losses

    def backward(self, loss: Tensor) -> None:
        """Add a micro-step's gradients to the fragments."""
        self.module.backward(loss, scale_wrt_gas=False)

    @torch.no_grad()
    def mask(self) -> None:
        """Set gradients to zero where the player's masks say that nothing learns."""
        masks = {id(self.player.module.get_parameter(name)): mask for name, mask in self.masks.items()}
        for parameter, start, gradient in self._fragments():
            if id(parameter) in masks:
                mask = masks[id(parameter)].flatten()[start : start + gradient.numel()]
                gradient.mul_(mask.view_as(gradient))

    @torch.no_grad()
    def clip(self) -> Tensor | None:
        """Scale the gradients down to ``max_grad_norm``; returns their norm before, none without a limit."""
        if self.loop.max_grad_norm is None:
            return None
        norm = self.norms().norm()
        factor = (self.loop.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        for _, _, gradient in self._fragments():
            gradient.mul_(factor)
        return norm

    @torch.no_grad()
    def norms(self) -> Tensor:
        """The 2-norm of each trained parameter's whole gradient, float32 ``[parameters]``."""
        places = {id(p): i for i, p in enumerate(self.player.trained())}
        squares = torch.zeros(len(places), dtype=torch.float64, device=self.accelerator.device)
        for parameter, _, gradient in self._fragments():
            squares[places[id(parameter)]] += gradient.float().norm().double().square()
        dist.all_reduce(squares)
        return squares.sqrt().float()

    def step(self, rate: float, good: Tensor) -> None:
        """An optimizer step, which changes nothing unless the step is good; whole weights go to all processes."""
        self._set_rate(self.optimizer, rate)
        self.optimizer.optimizer.found_inf = (~good).float()  # read by the fused optimizer, on the device
        self.module.step()

    @torch.no_grad()
    def moments(self, *, keep: bool) -> dict[str, Tensor]:
        """The optimizer's whole moments on the CPU as ``<parameter index>.<name>``; nothing unless ``keep``."""
        found: dict[str, Tensor] = {}
        for number, parameter, state in self._states():
            if not state:  # no step was made yet
                continue
            for name in MOMENTS:
                whole = torch.zeros(parameter.numel(), dtype=state[name].dtype, device=state[name].device)
                if (part := parameter._hp_mapping) is not None:
                    whole[_place(part.lp_fragment_address)] = state[name][_place(part.hp_fragment_address)]
                dist.all_reduce(whole)
                if keep:
                    found[f"{number}.{name}"] = whole.view_as(parameter).to("cpu", copy=True)
            if keep:
                found[f"{number}.step"] = state["step"].to("cpu", copy=True)
        return found

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], moments: dict[str, Tensor], where: Path) -> None:
        """Put back what :meth:`tensors` and :meth:`moments` gave, from the checkpoint ``where``."""
        restore_module(self.player.module, tensors, where)
        self.optimizer.refresh_fp32_params()
        steps = [value for key, value in moments.items() if key.endswith(".step")]
        if not steps:
            return
        for flat in self._flat():
            self.optimizer.optimizer.state[flat] = {
                "step": torch.stack(steps).max().to(flat.device, torch.float32),
                **{name: torch.zeros_like(flat) for name in MOMENTS},
            }
        for number, parameter, state in self._states():
            for name in MOMENTS:
                value = moments.get(f"{number}.{name}")  # none where a weight never had a gradient
                if value is not None and (part := parameter._hp_mapping) is not None:
                    piece = value.flatten()[_place(part.lp_fragment_address)]
                    state[name][_place(part.hp_fragment_address)] = piece.to(state[name].device)

    def dissolve(self) -> None:
        """Give the module's weights memory of their own again, and let the engine go."""
        self.module.destroy()
        for parameter in self._parameters:
            parameter.data = parameter.data.clone()

    def _flat(self) -> list[Tensor]:
        """This process's piece of the weights, one for each group of parameters; keys of the optimizer's state."""
        flat: list[Tensor] = self.optimizer.single_partition_of_fp32_groups
        return flat

    def _states(self) -> Iterator[tuple[int, Any, dict[str, Tensor]]]:
        """Each trained parameter with its number and the optimizer's state of the piece its group has here."""
        number = 0
        for group, flat in zip(self.optimizer.bit16_groups, self._flat()):
            for parameter in group:
                yield number, parameter, self.optimizer.optimizer.state.get(flat, {})
                number += 1

    def _fragments(self) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
        """Parameters that this process has a part of, where it starts in the flat parameter, and its gradient."""
        for parameter in self._parameters:
            part = parameter._hp_mapping
            if part is not None:
                gradient = part.get_lp_grad_fragment(parameter._index_in_param_group)
                yield parameter, part.lp_fragment_address.start, gradient


def _place(address: Any) -> slice:
    """Of a fragment in a flat tensor."""
    return slice(address.start, address.start + address.numel)
