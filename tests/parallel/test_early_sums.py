"""Sums that begin during the backward pass: when, in which order, and what happens to those of a step that was left."""

import torch
from torch import nn

from llm.parallel.early_sums import EarlySums


class Net(nn.Module):
    """Three layers; notes what began before the gradient of each layer's input was asked for."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.begun, self.seen = [], {}
        parts = [list(layer.parameters()) for layer in self.layers]
        self.sums = EarlySums(parts, self.start)

    def start(self, number: int):
        self.begun.append(number)
        return lambda: self.layers[number].weight.grad.clone()

    def step(self, used=(0, 1, 2), passes: int = 2) -> None:
        """Run some passes, of which the last may begin sums."""
        self.begun.clear()
        for turn in range(passes):
            x = torch.ones(1, 2, requires_grad=True)
            for number in used:
                x = self.layers[number](x)
                x.register_hook(lambda _, number=number: self.seen.update({number: list(self.begun)}))
            if turn == passes - 1:
                with self.sums.last_pass():
                    x.sum().backward()
            else:
                x.sum().backward()


def test_the_first_step_finds_the_order_and_the_next_ones_begin_as_gradients_are_ready():
    net = Net()
    net.step()
    assert net.begun == []
    grads = [summed() for summed in net.sums.take()]
    assert net.begun == [2, 1, 0]
    assert all(torch.equal(grad, layer.weight.grad) for grad, layer in zip(grads, net.layers, strict=True))
    net.step()
    assert net.seen == {2: [], 1: [2], 0: [2, 1]} and net.begun == [2, 1, 0]
    net.sums.take()
    net.step(passes=1)
    assert net.seen[0] == [2, 1]


def test_a_part_without_gradients_waits_for_the_end_and_so_do_those_behind_it():
    """Other processes may have its gradients: all start their sums in one order, and before they exchange losses."""
    net = Net()
    net.step()
    net.sums.take()
    net.step(used=(0, 2))
    assert net.seen[0] == [2] and net.begun == [2, 1, 0]
    net.sums.take()
    assert net.begun == [2, 1, 0]


def test_a_part_that_never_had_gradients_comes_last():
    net = Net()
    net.step(used=(0, 1))
    net.sums.take()
    net.step()
    assert net.begun == [1, 0, 2]


def test_sums_of_a_step_that_was_given_up_are_awaited_and_made_anew():
    net = Net()
    net.step()
    net.sums.take()
    net.step()
    awaited = []
    net.sums.begun = {number: lambda number=number: awaited.append(number) for number in net.sums.begun}
    net.zero_grad()
    net.step(passes=1)
    assert awaited == [2, 1, 0]
    assert torch.equal(net.sums.take()[0](), net.layers[0].weight.grad)
