"""Detecting, skipping, counting and logging bad steps, so that one does not ruin a run.

A step is bad if a loss or a gradient is not finite, or the gradient norm exceeds ``skip_grad_norm``. The verdict stays
on the device, where the fused optimizer reads it without synchronisation; the host reads and logs it when losses are
logged anyway.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from davae.data import as_item_dataset
from davae.errors import DavaeError
from davae.recipes.loop import LoopSettings
from davae.runtime.atomic_files import atomic_json, make_folder
from davae.runtime.processes import rank_and_world
from davae.runtime.weight_files import atomic_tensors
from davae.training.engine.tensors import changing_buffers
from davae.training.stage import Stage

logger = logging.getLogger(__name__)
_IDS_SHOWN = 8
_HALVINGS = 24  # of the fp16 loss scale, initially 2^16


@dataclass
class _Verdict:
    """The verdict on one step of one module, as tensors that the host has not read yet."""

    step: int
    trained: str
    terms: list[str]
    finite_terms: Tensor  # bool [terms]
    finite_layers: Tensor  # bool [parameters]
    norm: Tensor  # of the whole gradient
    own: Tensor  # bool: good in this process
    good: Tensor  # bool: good in all processes
    ids: list[str]
    finite_latents: Tensor | None  # bool [ids]: of precomputed latents


@dataclass
class NonFiniteGuard:
    """Judges the steps of a run.

    Args:
        stage: the stage's name, for messages.
        loop: settings of the training, with the limits.
        folder: where ``skipped_steps.jsonl`` and, when the guard gives up, ``failure/`` are written.
    """

    stage: str
    loop: LoopSettings
    folder: Path
    section: str = ""
    """The recipe's section, for advice in messages."""
    skipped: int = 0
    """Steps skipped in the whole run."""
    in_a_row: int = 0
    """Consecutive skipped steps, without the overflows below."""
    overflows: int = 0
    """Steps in a row whose fp16 gradients overflowed; the first of them are the search for a scale."""
    _skipped_here: int = 0
    _bad_latents: bool = False
    _unread: list[_Verdict] = field(default_factory=list)
    _names: dict[str, list[str]] = field(default_factory=dict)

    def check(
        self,
        step: int,
        trained: str,
        losses: list[dict[str, Tensor]],
        ids: list[str],
        names: list[str],
        norms: Tensor,
        norm: Tensor | None,
        agree: Callable[[Tensor], Tensor] = lambda good: good,
        finite_latents: Tensor | None = None,
    ) -> Tensor:
        """Whether a step is good, as a boolean scalar on the device.

        Args:
            step: steps done after this one.
            trained: name of the module.
            losses: named losses of every micro-step.
            ids: the images of the step.
            names: the trained parameters.
            norms: 2-norms of their gradients, ``[parameters]``.
            norm: 2-norm of the whole gradient before clipping; ``None`` if it was not clipped.
            agree: maps this process's verdict to that of all processes, which is counted and returned.
            finite_latents: whether each latent of the batch is finite, boolean ``[ids]``; ``None`` without latents.
        """
        self._names[trained] = names
        total = norms.norm() if norm is None else norm.detach()
        terms = [name for part in losses for name in part]
        finite_terms = torch.stack(
            [v.detach().isfinite().all().to(norms.device) for part in losses for v in part.values()]
        )
        own = finite_terms.all() & norms.isfinite().all()
        if self.loop.skip_grad_norm is not None:
            own = own & (total <= self.loop.skip_grad_norm)
        good = agree(own)
        self._unread.append(
            _Verdict(step, trained, terms, finite_terms, norms.isfinite(), total, own, good, ids, finite_latents)
        )
        return good

    def read(self) -> None:
        """Read the verdicts so far (synchronises with the device); count and report the bad ones."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        good = torch.stack([v.good for v in unread]).tolist()
        by_step: dict[int, bool] = {}
        overflown: set[int] = set()
        for verdict, fine in zip(unread, good):
            by_step[verdict.step] = by_step.get(verdict.step, True) and fine
            if not fine:
                if self._is_overflow(verdict):
                    overflown.add(verdict.step)
                self._tell(verdict)
        for step, fine in by_step.items():
            self.skipped += not fine
            self._skipped_here += not fine
            if fine:
                self.in_a_row = self.overflows = 0
            elif step in overflown and self.overflows < _HALVINGS:
                self.overflows += 1
            else:
                self.in_a_row += 1

    def _is_overflow(self, verdict: _Verdict) -> bool:
        """Whether fp16 gradients overflowed, upon which the loss scale is halved.

        Gradients are the same in all processes, so all count alike.
        """
        return self.loop.precision == "fp16" and not verdict.finite_layers.all()

    @property
    def exhausted(self) -> bool:
        """Whether ``max_skipped_steps`` consecutive steps were skipped."""
        return self.in_a_row >= self.loop.max_skipped_steps

    def give_up(self, batch: dict[str, Any]) -> None:
        """Write the last batch to ``failure/`` and end the run.

        Raises:
            DavaeError: always; the message says where to look.
        """
        failure = self.folder / "failure" / self._of_rank("")
        flat = {k: v for k, v in batch.items() if not isinstance(v, dict)}
        for group, values in batch.items():
            if isinstance(values, dict):
                flat |= {f"{group}.{name}": value for name, value in values.items()}
        atomic_tensors(failure / "batch.safetensors", {k: v for k, v in flat.items() if isinstance(v, Tensor)})
        plain = {k: v for k, v in flat.items() if isinstance(v, (list, str, int))}
        atomic_json(failure / "batch.json", plain)
        raise DavaeError(
            f"{self.stage}: {self.in_a_row} steps in a row were not finite or too steep and were skipped. Each is "
            f"told in {self._report()}, the last batch is in {failure}, the weights in the last checkpoint. "
            f"{self._advice()}"
        )

    def refuse_if_nothing_was_learnt(self, first: int, last: int) -> None:
        """Refuse to finish a run if every step was skipped, since its start or since it was resumed.

        Args:
            first, last: steps done before and after training in this process.

        Raises:
            DavaeError: every step was skipped; the message says where they are logged.
        """
        if (last > first and self._skipped_here >= last - first) or 0 < last <= self.skipped:
            raise DavaeError(
                f"{self.stage}: every one of the {last - first or last} steps was skipped, so nothing was learnt and "
                f"nothing is written. Each is told in {self._report()}. {self._advice()}"
            )

    def _advice(self) -> str:
        if self._bad_latents:
            return "Latents that were made beforehand are not finite: make the cache again, into another folder"
        dot = f"{self.section}." if self.section else ""
        advice = [f"a lower {dot}optimizer.learning_rate", f"{dot}loop.max_grad_norm=1"]
        if self.loop.skip_grad_norm is not None:
            advice.insert(0, f"a {dot}loop.skip_grad_norm above {self.loop.skip_grad_norm:g}")
        if self.loop.precision != "no":
            advice.append(f"{dot}loop.precision=no, which computes in float32")
        return f"The same command goes on from there with {', with '.join(advice[:-1])}, or with {advice[-1]}"

    def _tell(self, verdict: _Verdict) -> None:
        bad_terms = [n for n, fine in zip(verdict.terms, verdict.finite_terms.tolist()) if not fine]
        names = self._names[verdict.trained]
        layers = [n for n, fine in zip(names, verdict.finite_layers.tolist()) if not fine]
        norm = float(verdict.norm)
        latents = [] if verdict.finite_latents is None else verdict.finite_latents.tolist()
        bad_latents = [name for name, fine in zip(verdict.ids, latents) if not fine]
        if bad_latents:
            self._bad_latents = True
            more = f" and {len(bad_latents) - 1} more" if len(bad_latents) > 1 else ""
            what = f"the latent of {bad_latents[0]}{more}, made beforehand, is not finite"
        elif bad_terms:
            what = f"loss '{bad_terms[0]}' is not finite"
        elif layers:
            what = f"the gradient of {layers[0]} is not finite"
        elif bool(verdict.own):
            what = "another process found it bad"
        else:
            what = f"the gradient norm {norm:.3g} exceeds skip_grad_norm"
        message = ", ".join(verdict.ids[:_IDS_SHOWN]) + (" ..." if len(verdict.ids) > _IDS_SHOWN else "")
        logger.warning("%s: step %d is skipped: %s (images %s)", self.stage, verdict.step, what, message)
        line = {
            "step": verdict.step,
            "module": verdict.trained,
            "reason": what,
            "terms": sorted(set(bad_terms)),
            "layers": layers[:_IDS_SHOWN],
            "gradient_norm": norm if verdict.norm.isfinite() else None,
            "ids": verdict.ids,
        }
        make_folder(self.folder)
        with self._report().open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _report(self) -> Path:
        """``skipped_steps.jsonl``, or ``skipped_steps.rank-N.jsonl`` in processes other than the first."""
        return self.folder / f"skipped_steps{self._of_rank('.')}.jsonl"

    @staticmethod
    def _of_rank(before: str) -> str:
        rank = rank_and_world()[0]
        return f"{before}rank-{rank}" if rank else ""

    def state_dict(self) -> dict[str, int]:
        """The counts, for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the counts."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


class BatchNormSnapshot:
    """Running statistics of batch norms before a step, to be restored if the step is bad."""

    def __init__(self, module: nn.Module) -> None:
        self._buffers = list(changing_buffers(module).values())
        self._before = [b.clone() for b in self._buffers]

    def restore_unless(self, good: Tensor) -> None:
        """Restore the statistics if ``good`` (a boolean scalar on the device) is false."""
        for buffer, before in zip(self._buffers, self._before):
            buffer.copy_(torch.where(good, buffer, before))


def _smaller_batches(loop: LoopSettings, section: str) -> str:
    """Settings that give the same images to a step in more parts."""
    parts = next(n for n in range(2, loop.batch_size + 1) if loop.batch_size % n == 0)
    return (
        f"{section}.loop.batch_size={loop.batch_size // parts} with "
        f"{section}.loop.gradient_accumulation={parts * loop.gradient_accumulation}"
    )


def out_of_memory_message(stage: Stage, *, validating: bool = False) -> str:
    """The error for a step, or a validation, that does not fit in memory: settings that reduce it, cheapest first.

    Args:
        stage: what is trained.
        validating: whether memory ran out in validation.
    """
    loop, section = stage.loop, stage.section or stage.name
    fixed = as_item_dataset(stage.dataset).bucket_of is not None  # buckets fix the images of a step
    advice = []
    if validating:
        if loop.validation_images > 1:
            advice.append(f"{section}.loop.validation_images={loop.validation_images // 2}")
        if loop.batch_size > 1 and not fixed:
            advice.append(_smaller_batches(loop, section))
        what = ", or with ".join(advice) or f"{section}.loop.validate_every=0, and on a larger device at the end"
        return (
            f"{section}: the device's memory is not enough for a validation. What was due is saved; run the same "
            f"command again with {what}"
        )
    if not loop.gradient_checkpointing and stage.can_recompute:
        advice.append(f"{section}.loop.gradient_checkpointing=true")
    if loop.precision == "no":
        advice.append(f"{section}.loop.precision=bf16")
    if loop.batch_size > 1 and not fixed:
        advice.append(_smaller_batches(loop, section))
    if section in ("diffusion", "transformer"):
        advice.append("data.cache=FOLDER, latents and text made beforehand by `davae cache`")
    advice.append("another run, with a lower data.resolution")
    return f"{section}: the device's memory is not enough for a step. In this order: " + "; ".join(
        f"({i}) {a}" for i, a in enumerate(advice[:3], 1)
    )
