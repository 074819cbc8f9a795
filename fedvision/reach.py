"""Which of a model's parameters the gradient of a loss has reached."""

from collections.abc import Iterator

from torch import Tensor, nn

from fedvision.arrays import Named


class Reach:
    """Which parameters of a model a gradient has reached since it was made; before the first loss all count as reached.

    A parameter is reached if the loss was computed from it. One that is in the model and not in the loss, as a decoder of depth where
    no picture has any, is not: it has no gradient, which is less than a gradient of zero.

    >>> model = nn.ModuleDict({"used": nn.Linear(1, 1), "idle": nn.BatchNorm1d(1)})
    >>> reach = Reach(model)
    >>> reach.follow(dict(model.named_parameters()), model["used"].weight.sum())
    >>> sorted(reach.untrained)
    ['idle.bias', 'idle.num_batches_tracked', 'idle.running_mean', 'idle.running_var', 'idle.weight', 'used.bias']
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._missed: set[str] | None = None

    def follow(self, params: Named, loss: Tensor) -> None:
        """Follow the graph of a loss, which must still exist, back to ``params``; costs nothing once all have been reached."""
        if self._missed is None:
            self._missed = set(params)
        if self._missed:
            names = {param: name for name, param in params.items()}
            self._missed -= {names[leaf] for leaf in _leaves(loss) if leaf in names}

    @property
    def untrained(self) -> frozenset[str]:
        """The parameters that no gradient has reached, and the buffers of modules that have parameters of their own, but none reached.

        The running statistics of a BatchNorm that had nothing to do say as little as its weights.
        """
        missed = frozenset(self._missed or ())
        return missed.union(*(self._idle_buffers(prefix, module, missed) for prefix, module in self._model.named_modules() if missed))

    @staticmethod
    def _idle_buffers(prefix: str, module: nn.Module, missed: frozenset[str]) -> set[str]:
        own = {name for name, param in module.named_parameters(prefix, recurse=False) if param.requires_grad}
        return {name for name, _ in module.named_buffers(prefix, recurse=False)} if own and own <= missed else set()


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors that a loss was computed from."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [following for following, _ in node.next_functions]
