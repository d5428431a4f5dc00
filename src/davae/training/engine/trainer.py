"""A module as the loop trains it: losses, gradients, optimizer steps, and its part of a checkpoint.

Weights and moments are whole in every process or sharded by FSDP2 (:mod:`davae.training.engine.fsdp`). With several
processes all ranks must call every method.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from davae.models.fp32_linear_attention import keep_linear_attention_in_float32
from davae.pipelines.sampling.speed import compile_regions, order_channels_last
from davae.recipes.loop import LoopSettings
from davae.runtime.devices import use_gpu_for_training
from davae.training.engine.fsdp import is_sharding, leave_constants, replicate, shard, synchronise_norms, unsynced
from davae.training.engine.optimizer import make_optimizer
from davae.training.engine.tensors import (
    clip_gradients,
    full_state_on_cpu,
    gradient_norms,
    mask_gradients,
    module_tensors,
    optimizer_tensors,
    restore_module,
    restore_optimizer,
    spread_masks,
)
from davae.training.stage import TrainedModule


class ModuleTrainer:
    """A trained module and its optimizer, as prepared by :func:`prepare`.

    Args:
        accelerator: of the training.
        loop: settings of the training.
        trained: the module, with its optimizer settings and masks.
        module: the module wrapped to synchronise gradients between processes.
        optimizer: over the trained parameters.
    """

    def __init__(
        self, accelerator: Accelerator, loop: LoopSettings, trained: TrainedModule, module: nn.Module, optimizer: Any
    ) -> None:
        self.accelerator, self.loop, self.trained = accelerator, loop, trained
        self.module: Any = module
        self.optimizer = optimizer
        self.masks = spread_masks(trained.module, trained.gradient_masks)
        self._shares: dict[str, Tensor] = {}  # of a step with its own rate, for each entry of a parameter
        for name, mask in spread_masks(trained.module, trained.rate_masks).items():
            others = trained.optimizer.learning_rate / trained.learning_rates[name]
            self._shares[name] = others + (1 - others) * mask
        self.names = [n for n, p in trained.module.named_parameters() if p.requires_grad]
        """The trained parameters, in the order of :meth:`norms`."""

    def zero_grad(self) -> None:
        """Reset the gradients."""
        self.optimizer.zero_grad()

    def losses(self, batch: dict[str, Any], step: int, *, last: bool) -> dict[str, Tensor]:
        """Named scalar losses of a micro-step, among them ``total``.

        Args:
            batch: on the device.
            step: optimizer steps done.
            last: whether this is the step's last micro-step, whose backward synchronises gradients.
        """
        with nullcontext() if last else unsynced(self.accelerator, self.module), self.accelerator.autocast():
            losses: dict[str, Tensor] = self.module(batch, step)
        return losses

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a scalar loss."""
        self.accelerator.backward(loss)

    def mask(self) -> None:
        """Set gradients to zero where the module's masks are false."""
        mask_gradients(self.trained.module, self.masks)

    def clip(self) -> Tensor | None:
        """Scale the gradients down to ``max_grad_norm``; returns their norm before, ``None`` without a limit.

        fp16 gradients are unscaled first; the loss scale must not change before all trainers have called this.
        """
        self.accelerator.unscale_gradients(self.optimizer)
        if self.loop.max_grad_norm is None:
            return None
        return clip_gradients(self.trained.parameters(), self.loop.max_grad_norm)

    def norms(self) -> Tensor:
        """The 2-norm of each trained parameter's whole gradient, float32 ``[parameters]``, ordered as :attr:`names`."""
        return gradient_norms(self.trained.parameters())

    def step(self, rate: float, good: Tensor) -> None:
        """Make an optimizer step; it changes nothing if the step is not good.

        Args:
            rate: learning rate, to be multiplied by each group's ``rate_factor``.
            good: boolean scalar on the device, the same in every process.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        optimizer = self.optimizer.optimizer  # accelerate's wrapper asks the scaler, which sees gradients only
        optimizer.found_inf = (~good).float()  # the fused optimizer reads it on the device
        with self._rates_of_parts():
            optimizer.step()

    @contextmanager
    def _rates_of_parts(self) -> Iterator[None]:
        """Context of a step in which entries whose rate mask is false move as far as with the optimizer's own rate."""
        parts = {name: self.trained.module.get_parameter(name) for name in self._shares}
        before = {name: parameter.detach().clone() for name, parameter in parts.items()}
        yield
        with torch.no_grad():
            for name, parameter in parts.items():
                parameter.copy_(before[name] + self._shares[name] * (parameter - before[name]))

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Context in which the parameters are those to evaluate and to export: schedule-free training has averages.

        Those of training come back bit by bit.
        """
        if self.trained.optimizer.kind != "schedule_free":
            yield
            return
        optimizer, parameters = self.optimizer.optimizer, self.trained.parameters()
        kept = [parameter.detach().clone() for parameter in parameters]
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()
            with torch.no_grad():
                for parameter, own in zip(parameters, kept):
                    parameter.copy_(own)

    @property
    def learning_rates(self) -> dict[str, float]:
        """Those of the last step: ``learning_rate``, and ``learning_rate_<group>`` of groups with their own rate."""
        groups = self.optimizer.param_groups
        own = {f"learning_rate_{group['name']}": float(group["lr"]) for group in groups if group["name"]}
        rest = [float(group["lr"]) for group in groups if not group["name"]]
        return {"learning_rate": rest[0] if rest else groups[0]["lr"] / groups[0]["rate_factor"], **own}

    @property
    def order(self) -> list[str]:
        """Names of the trained parameters in the optimizer's order."""
        names = {id(parameter): name for name, parameter in self.trained.module.named_parameters()}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]

    def tensors(self) -> dict[str, Tensor]:
        """Trained weights and running statistics by name; sharded ones are not gathered."""
        return module_tensors(self.trained.module)

    def moments(self, *, keep: bool) -> dict[str, Tensor]:
        """The optimizer's whole state on the CPU by ``<parameter index>.<name>``; empty unless ``keep``."""
        return full_state_on_cpu(optimizer_tensors(self.optimizer), keep=keep)

    def restore(
        self, tensors: dict[str, Tensor], moments: dict[str, Tensor], where: Path, order: list[str] | None = None
    ) -> None:
        """Restore what :meth:`tensors` and :meth:`moments` gave.

        Args:
            tensors, moments: of the checkpoint.
            where: the checkpoint, for errors.
            order: :attr:`order` when it was saved, by default the current one; it changes with learning rates.
        """
        restore_module(self.trained.module, tensors, where)
        if order is not None:
            places = {name: number for number, name in enumerate(self.order)}
            split = {key: key.partition(".") for key in moments}
            moments = {f"{places[order[int(i)]]}.{name}": moments[key] for key, (i, _, name) in split.items()}
        restore_optimizer(self.optimizer, moments)


def prepare(accelerator: Accelerator, loop: LoopSettings, trained: TrainedModule, *, is_model: bool) -> ModuleTrainer:
    """Put a trained module on its device and prepare it as the settings and the launcher say.

    Args:
        accelerator: of :func:`davae.training.engine.fsdp.begin_accelerator`.
        loop: settings of the training.
        trained: its module is changed in place.
        is_model: whether it is the model, which may be sharded, and not a discriminator, which is replicated.
    """
    module, device = trained.module, accelerator.device
    sharded = is_sharding(accelerator) and is_model and trained.can_be_sharded
    if not sharded:  # a model to be sharded may not fit on the device whole
        module.to(device)
    module.train()  # loaded models come in eval mode
    keep_linear_attention_in_float32(module)
    leave_constants(module)
    if accelerator.num_processes > 1 and device.type == "cuda":
        synchronise_norms(module)
    use_gpu_for_training()
    # A GPU's tensor cores take convolutions in this order; cuDNN converts others to it and back. torch's CUDA group
    # norm gives back contiguous tensors, so that each norm costs one such conversion: no more than without.
    if loop.channels_last:
        order_channels_last(module)
    if loop.compile:
        compile_regions(module)
    optimizer = make_optimizer(trained.name, module, trained.optimizer, trained.learning_rates)
    prepared: Any
    if sharded:
        prepared = shard(accelerator, module, optimizer)
    elif is_sharding(accelerator):
        prepared = replicate(module, device), accelerator.prepare_optimizer(optimizer)
    else:
        prepared = accelerator.prepare(module, optimizer)
    return ModuleTrainer(accelerator, loop, trained, *prepared)
