"""The moving average against its closed form."""

import torch
from torch import nn

from davae.training.loop.averages import Ema


def test_it_follows_the_recursion():
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    ema = Ema([parameter], decay=0.5)
    expected = parameter.detach().clone()
    for n, value in enumerate([3.0, -1.0, 4.0], start=1):
        parameter.data.fill_(value)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(ema.averages[0], expected)


def test_a_skipped_step_neither_moves_nor_counts():
    """As if it had not been, also where the weights moved before it and for the warm-up of the decay."""
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    with_skips, without = Ema([parameter], decay=0.999), Ema([parameter], decay=0.999)
    for value, good in ((3.0, True), (7.0, False), (3.0, False), (-1.0, True)):
        parameter.data.fill_(value)
        with_skips.update(torch.tensor(good))
        if good:
            without.update()
    assert torch.equal(with_skips.averages[0], without.averages[0])
    assert int(with_skips.updates) == 2


def test_a_constant_weight_keeps_its_value_exactly():
    parameter = nn.Parameter(torch.full((3,), 0.3))
    ema = Ema([parameter], decay=0.999)
    for _ in range(100):
        ema.update()
    assert torch.equal(ema.averages[0], parameter.detach())


def test_own_weights_come_back_even_after_an_error():
    parameter = nn.Parameter(torch.zeros(2))
    ema = Ema([parameter], decay=0.9)
    parameter.data.fill_(5.0)
    try:
        with ema.applied():
            assert torch.equal(parameter.detach(), torch.zeros(2))
            raise KeyError("inside")
    except KeyError:
        pass
    assert torch.equal(parameter.detach(), torch.full((2,), 5.0))
    assert torch.equal(ema.averages[0], torch.zeros(2))


def test_it_may_be_kept_elsewhere_and_in_another_precision_than_the_weights():
    """On the meta device nothing is computed, but everything is put in its place."""
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    beside, apart = Ema([parameter], decay=0.9), Ema([parameter], decay=0.9, device="meta")
    apart.update()
    assert (apart.averages[0].device.type, apart.averages[0].dtype) == ("meta", torch.float32)
    assert apart.updates.device.type == "meta"
    assert beside.averages[0].device.type == "cpu"
    assert beside.averages[0].data_ptr() != parameter.data_ptr()
