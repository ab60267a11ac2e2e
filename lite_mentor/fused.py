"""Linear layers that read the same tensor, computed as one product: q, k and v of an attention, gate and up of an MLP.

Decoding a few tokens costs a launch for every operator and little else, and three products of a short input are three
launches and three passes over it. Which layers read the same tensor is seen in a run of the model, not known by name.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn


@torch.no_grad()
def same_input(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> list[list[str]]:
    """The layers by name, in groups: those that, while `run` ran, were called once each, under one parent, with one
    and the same tensor, unchanged between them. In the order of their calls; a layer that shares nothing is alone.
    """
    calls: list[tuple[str, torch.Tensor, int]] = []

    def seen(name: str, inputs: tuple) -> None:
        if inputs:
            calls.append((name, inputs[0], inputs[0]._version))

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen(name, inputs))
        for name, layer in layers.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    times = Counter(name for name, _, _ in calls)
    groups: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    for name, tensor, version in calls:  # which keeps all tensors, so that none has got the id of an earlier one
        if times[name] == 1:
            groups[name.rpartition(".")[0], id(tensor), version].append(name)
    together = {name for names in groups.values() for name in names}
    return [*groups.values(), *([name] for name in layers if name not in together)]


class SharedProduct:
    """input @ weight.T + bias for several layers at once: weight [sum of their outputs, inputs], their rows in order.

    What the first layer's call has computed is kept until the others have taken their columns, and no longer. A layer
    that is given another tensor than the first one was, or that comes a second time, computes its own.
    """

    def __init__(self, weight_OH: torch.Tensor, bias_O: torch.Tensor | None, sizes: list[int]):
        self.weight_OH, self.bias_O, self.sizes = weight_OH, bias_O, sizes
        self.weights = weight_OH.split(sizes)
        self.biases = [None] * len(sizes) if bias_O is None else bias_O.split(sizes)
        self._input: torch.Tensor | None = None
        self._left: dict[int, torch.Tensor] = {}

    def take(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """The output of layer i for x; columns of a wider tensor."""
        if i == 0:
            self._left = dict(enumerate(F.linear(x, self.weight_OH, self.bias_O).split(self.sizes, -1)))
            self._input = x
        part = self._left.pop(i, None) if self._input is x else None
        if not self._left:
            self._input = None
        return F.linear(x, self.weights[i], self.biases[i]) if part is None else part


class FusedLinear(nn.Linear):
    """Layer i of a shared product. Its weight and bias are rows of the product's, so what is written there is seen."""

    def __init__(self, product: SharedProduct, i: int):
        weight, bias = product.weights[i], product.biases[i]
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._product, self._i = product, i

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., inputs] -> [..., outputs], which need not be contiguous."""
        return self._product.take(self._i, x)
