"""Random numbers that do not depend on how a batch is divided among processes.

Every process seeds torch's generators alike for a training step. With several processes, ``rand``, ``randn``, their
``_like`` forms and ``randint`` draw for the whole batch and return the process's own rows, so that a sample gets the
same noise and time on one process with batch ``2 B`` as on two with batch ``B``. In validation every item has its own
generator, so that its noise does not depend on the batch at all.

The loop sets how a batch draws (:func:`draws_by`), and the objective makes its draws under :func:`drawing`, never
around layers: recomputed ones are not under the mode again, and compiled ones would be compiled anew for it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_BY_SHAPE = (torch.randn, torch.rand)
_LIKE = {torch.randn_like: torch.randn, torch.rand_like: torch.rand}


class _BatchDraws(TorchFunctionMode):
    """Context in which draws whose first axis is the batch are made by :meth:`_batch`.

    Draws of another length on the first axis, those from an explicit generator, and torch's dropout are unchanged.

    Args:
        batch_size: length of the first axis of such draws.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def _batch(self, draw: Callable[..., Tensor], shape: tuple[int, ...], kwargs: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the draws; call everything else as it is."""
        kwargs = kwargs or {}
        if kwargs.get("generator") is None:
            if func in _BY_SHAPE:
                shape = kwargs.pop("size", None) or (args[0] if isinstance(args[0], (tuple, list)) else args)
                return self._rows(func, tuple(shape), kwargs)
            if func in _LIKE:
                like: Tensor = args[0]
                facts = {"dtype": like.dtype, "device": like.device, **kwargs}
                facts.pop("memory_format", None)
                return self._rows(_LIKE[func], tuple(like.shape), facts)
            if func is torch.randint and len(args) >= 2 and isinstance(args[-1], (tuple, list)):
                return self._rows(functools.partial(func, *args[:-1]), tuple(args[-1]), kwargs)
        return func(*args, **kwargs)

    def _rows(self, draw: Callable[..., Tensor], shape: tuple[int, ...], kwargs: dict[str, Any]) -> Tensor:
        if not shape or shape[0] != self.batch_size:
            return draw(shape, **kwargs)
        return self._batch(draw, shape, kwargs)


_SET: ContextVar[_BatchDraws | None] = ContextVar("how a batch draws", default=None)


@contextmanager
def draws_by(how: _BatchDraws | None) -> Iterator[None]:
    """Context in which :func:`drawing` draws as ``how`` says, or, with ``None``, as torch does."""
    token = _SET.set(how)
    try:
        yield
    finally:
        _SET.reset(token)


def drawing() -> AbstractContextManager[Any]:
    """The context for the random draws of an objective; no layer may run in it."""
    return _SET.get() or nullcontext()


class RankInvariantDraws(_BatchDraws):
    """Context in which draws over a batch return this process's rows of a draw over the batch of all processes.

    Args:
        rank: of this process.
        world_size: number of processes.
        batch_size: images per process and micro-step.
    """

    def __init__(self, rank: int, world_size: int, batch_size: int) -> None:
        super().__init__(batch_size)
        self.rank, self.world_size = rank, world_size

    def _batch(self, draw: Callable[..., Tensor], shape: tuple[int, ...], kwargs: dict[str, Any]) -> Tensor:
        whole = draw((self.world_size * shape[0], *shape[1:]), **kwargs)
        return whole[self.rank * shape[0] : (self.rank + 1) * shape[0]].clone()


class DrawsByItem(_BatchDraws):
    """Context in which each item of a batch draws from its own CPU generator: its noise depends neither on the other
    items nor on the device.

    Args:
        seeds: one per item of the batch.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__(len(seeds))
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def _batch(self, draw: Callable[..., Tensor], shape: tuple[int, ...], kwargs: dict[str, Any]) -> Tensor:
        rest = {name: value for name, value in kwargs.items() if name not in ("device", "generator")}
        rows = [draw((1, *shape[1:]), generator=generator, **rest) for generator in self.generators]
        return torch.cat(rows).to(kwargs.get("device") or torch.get_default_device())


def _seed_step(seed: int, step: int, micro: int) -> None:
    """Seed torch's generators from step and micro-step, alike in all processes (see :class:`RankInvariantDraws`)."""
    mixed = torch.Generator().manual_seed(seed * 1_000_003 + step)
    base = int(torch.randint(2**62, (), generator=mixed))
    torch.manual_seed(base + 1_009 * micro)
