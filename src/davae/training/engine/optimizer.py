"""Optimizers by name, with per-parameter learning rates, and the learning rate schedules of diffusers."""

import importlib
import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from davae.errors import DavaeError
from davae.recipes.loop import OptimizerSettings, in_steps


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Learning rate of ``step`` in [0, ``steps``): linear warm-up, then the schedule of diffusers' name.

    Schedules that fall end at ``lr_end``; ``piecewise_constant`` counts its steps from 0, without a warm-up.
    """
    peak, warmup, name = settings.learning_rate, in_steps(settings.lr_warmup_steps, steps), settings.lr_scheduler
    if name == "piecewise_constant":
        *rules, last = settings.lr_step_rules.split(",")
        found = sorted((int(end), float(factor)) for factor, _, end in (rule.partition(":") for rule in rules))
        return peak * next((factor for end, factor in found if step < end), float(last))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    height = {
        "constant": 1.0,
        "constant_with_warmup": 1.0,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "cosine_with_restarts": (1 + math.cos(math.pi * (settings.lr_num_cycles * done % 1))) / 2,
        "linear": 1 - done,
        "polynomial": (1 - done) ** settings.lr_power,
    }[name]
    return peak if name.startswith("constant") else settings.lr_end + (peak - settings.lr_end) * height


def make_optimizer(
    name: str, module: nn.Module, settings: OptimizerSettings, rates: dict[str, float]
) -> torch.optim.Optimizer:
    """The optimizer of ``settings.kind`` over a module's trained parameters.

    Every one skips a step if its ``found_inf`` is set, and its state is plain tensors and the groups' numbers of
    :data:`davae.training.engine.tensors.GROUP_STATE`, so that a checkpoint holds all of it and a resumed run is
    bit-identical.

    Args:
        name: of the module, for the error.
        module: its parameters that require gradients are trained.
        settings: of the optimizer.
        rates: learning rates by exact parameter name, where they differ from the settings'; stored relative to it as
            the parameter group's ``rate_factor``, which multiplies the scheduled rate. Such a group is named
            ``widened``; other groups have an empty name.

    Raises:
        DavaeError: no parameter requires gradients, or a package is needed and not installed; from ``step`` of all but
            AdamW, weights are sharded.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise DavaeError(f"{name}: no parameter is trained; check what the recipe tunes")
    hidden = _hidden_matrices(module) if settings.kind == "muon" else set()
    alike: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for parameter_name, parameter in named:
        decays = parameter.ndim > 1 or not settings.decay_only_matrices
        rate = rates.get(parameter_name, settings.learning_rate)
        decay = settings.weight_decay if decays else 0.0
        alike.setdefault((rate, decay, id(parameter) in hidden), []).append(parameter)
    groups = [
        {
            "params": parameters,
            "weight_decay": decay,
            "rate_factor": rate / settings.learning_rate,
            "name": "" if rate == settings.learning_rate else "widened",
        }
        for (rate, decay, _), parameters in alike.items()
    ]
    usual: dict[str, Any] = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}
    if settings.kind == "adamw":
        return torch.optim.AdamW(groups, **usual, fused=True)
    if settings.kind in ("adamw8bit", "paged_adamw8bit"):
        return _eight_bit_adamw(groups, settings)
    if settings.kind == "muon":
        parts = [[group for group, key in zip(groups, alike) if key[2] is part] for part in (True, False)]
        return _guarded(_Both, settings)(*parts, usual)
    if settings.kind == "adafactor":
        from transformers.optimization import Adafactor

        options = {"scale_parameter": False, "relative_step": False}  # the rate is the schedule's, as for AdamW
        return _guarded(Adafactor, settings)(groups, lr=settings.learning_rate, **options)
    if settings.kind == "prodigy":
        prodigy = _imported("prodigyopt", "Prodigy", settings)
        return _guarded(prodigy, settings)(groups, **usual, use_bias_correction=True, safeguard_warmup=True)
    schedule_free = _guarded(_imported("schedulefree", "AdamWScheduleFree", settings), settings)(groups, **usual)
    schedule_free.train()
    return schedule_free


class _Guard(torch.optim.Optimizer):
    """Mixed into an optimizer: like torch's fused AdamW it skips a step if ``found_inf`` is set."""

    found_inf: torch.Tensor | None = None
    kind = ""

    def step(self, closure: Any = None) -> Any:
        """A step, unless it is bad; :class:`DavaeError` if weights are sharded."""
        if any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            raise DavaeError(
                f"optimizer.kind={self.kind} cannot update weights that are sharded over processes (FSDP): "
                "set optimizer.kind=adamw, whose moments are sharded too"
            )
        if self.found_inf is not None and bool(self.found_inf):  # synchronises with the device
            return None
        return super().step(closure)


def _guarded(optimizer: Any, settings: OptimizerSettings) -> Any:
    return type(f"Guarded{optimizer.__name__}", (_Guard, optimizer), {"kind": settings.kind})


def _imported(package: str, name: str, settings: OptimizerSettings) -> Any:
    """An optimizer's class; :class:`DavaeError` if its package is not installed."""
    try:
        return getattr(importlib.import_module(package), name)
    except ImportError as error:
        raise DavaeError(
            f"optimizer.kind={settings.kind} needs {package.partition('.')[0]}, which cannot be imported ({error}): "
            f"`pip install {package.partition('.')[0]}`, or set optimizer.kind=adamw"
        ) from error


def _hidden_matrices(module: nn.Module) -> set[int]:
    """Ids of the matrices within a model's lists of blocks; tables of embeddings are none."""
    return {
        id(parameter)
        for blocks in module.modules()
        if isinstance(blocks, nn.ModuleList)
        for part in blocks.modules()
        if not isinstance(part, nn.Embedding)
        for parameter in part.parameters(recurse=False)
        if parameter.ndim == 2
    }


class _Both(torch.optim.Optimizer):
    """torch's Muon for hidden matrices and AdamW for the rest, as one optimizer.

    Muon's updates have the size of AdamW's (``match_rms_adamw``), so one learning rate suits both.
    """

    def __init__(self, hidden: list[dict[str, Any]], rest: list[dict[str, Any]], usual: dict[str, Any]) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise DavaeError("optimizer.kind=muon needs torch 2.9 or later: update torch, or set optimizer.kind=adamw")
        if not hidden:
            raise DavaeError("optimizer.kind=muon: no matrix within a block is trained; set optimizer.kind=adamw")
        muon = torch.optim.Muon(hidden, lr=usual["lr"], adjust_lr_fn="match_rms_adamw")
        self.parts = [muon, *([torch.optim.AdamW(rest, **usual, fused=True)] if rest else [])]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Groups and states of the parts are those of the whole."""
        first = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.param_groups, part.state = self.param_groups[first : first + count], self.state
            first += count

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> Any:
        """A step of each part."""
        for part in self.parts:
            part.step()


_WRAPPED = "__bnb_optimizer_quant_state__"


def _eight_bit_adamw(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with 8-bit moments; its state as a flat dictionary of plain tensors."""
    name = "AdamW8bit" if settings.kind == "adamw8bit" else "PagedAdamW8bit"
    base = _guarded(_imported("bitsandbytes.optim", name, settings), settings)

    def state_dict(self: Any) -> dict[str, Any]:
        found: dict[str, Any] = super(made, self).state_dict()
        found["state"] = {key: _flat(entry) for key, entry in found["state"].items()}
        return found

    def load_state_dict(self: Any, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        entries = {key: {**entry, "step": int(entry["step"])} for key, entry in state_dict["state"].items()}
        super(made, self).load_state_dict({**state_dict, "state": entries}, move_to_device)
        for parameter, entry in self.state.items() if self.is_paged else ():
            for moment in ("state1", "state2"):  # pages again, not tensors of the device
                entry[moment] = self.get_state_buffer(parameter, dtype=entry[moment].dtype).copy_(entry[moment])

    made: Any = type(base.__name__, (base,), {"state_dict": state_dict, "load_state_dict": load_state_dict})
    for group in groups:  # quantisation blocks follow memory order: make it the same in new and resumed runs
        for parameter in group["params"]:
            parameter.data = parameter.data.contiguous()
    optimizer: torch.optim.Optimizer = made(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps)
    return optimizer


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state without the nesting that bitsandbytes adds for FSDP."""
    return {name: value for name, value in entry.items() if name != _WRAPPED} | entry.get(_WRAPPED, {})
