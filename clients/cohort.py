"""Several clients at work at once: one computation, mapped over clients whose parameters are stacked.

Letters in shapes: c = clients, b = examples of the largest batch of a step.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fedvision import optimizers
from fedvision.arrays import Named
from fedvision.data import Examples
from fedvision.data.federated import Silos
from fedvision.errors import EngineError
from fedvision.learners.learner import Learner, is_mean_over_examples
from fedvision.reach import Reach
from fedvision.silo import visits
from strategies.strategy import ONE_BY_ONE

Place = slice | Tensor
"""Where the examples of a batch are among a client's."""


class OneClients:
    """In place of what belongs to one client: it refuses to be used.

    Args:
        name: of the silo's attribute.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def _refuse(self, *arguments: Any, **options: Any) -> Any:
        raise EngineError(f"a client_update that is declared @batchable uses silo.{self._name}, which is one client's; {ONE_BY_ONE}")

    __len__ = __iter__ = __contains__ = __getitem__ = __setitem__ = __getattr__ = __call__ = _refuse


@dataclass(frozen=True)
class Step:
    """The batches of all clients at one step.

    Attributes:
        fields: [c, b, ...] each; what is beyond a client's own batch is there to fill the tensor.
        sizes: how many examples of each client count; 0 for one that has no more batches.
    """

    fields: Named
    sizes: tuple[int, ...]

    @property
    def even(self) -> bool:
        """Whether all clients that have a batch have one of the same size."""
        return len({*self.sizes} - {0}) == 1

    @cached_property
    def counts(self) -> Int[Tensor, "c"]:
        """``sizes`` as a tensor."""
        return torch.tensor(self.sizes, device=next(iter(self.fields.values())).device)

    @cached_property
    def counted(self) -> Bool[Tensor, "c b"]:
        """Which examples count."""
        return torch.arange(max(self.sizes), device=self.counts.device) < self.counts[:, None]


class Cohort:
    """Clients that all hold the global model of a round; to a ``client_update``, the silo of all of them.

    It has what ``fedvision.silo.Silo`` has, with the clients as first dimension: ``params`` are [c, ...], and so are gradients;
    losses are [c]. What belongs to one client alone (its examples, its state, its generator) cannot be used.

    Args:
        learner: what is learned.
        model: a model of that learner; its weights are neither used nor changed.
        arrays: the global parameters and buffers, by the model's state-dict names.
        silos: the training examples of these and perhaps other clients.
        clients: which of them this cohort is.
        rngs: each client's own generator, which its batches and views are drawn from.
        progress: how much of the training is done, in [0, 1].

    Attributes:
        work: as ``Silo.work``, of each client.
    """

    def __init__(
        self,
        learner: Learner,
        model: nn.Module,
        arrays: Named,
        silos: Silos,
        clients: Sequence[int],
        rngs: Sequence[torch.Generator],
        progress: float = 0.0,
    ) -> None:
        self.learner, self.model, self.progress = learner, model.train(), progress
        self._arrays, self._silos, self._clients, self._rngs = arrays, silos, clients, rngs
        self._trained = [name for name, param in model.named_parameters() if param.requires_grad]
        self._parts = Tally(len(clients))
        self._reach = Reach(model)
        self.work = [0] * len(clients)
        self.train, self.state, self.rng, self.loss, self.arrange = map(OneClients, ("train", "state", "rng", "loss", "arrange"))

    def __len__(self) -> int:
        """How many clients."""
        return len(self._clients)

    @cached_property
    def params(self) -> dict[str, Float[Tensor, "c ..."]]:
        """Every client's own copy of the trainable parameters; ``descend`` changes them."""
        return {name: self._shared(self._arrays[name]).clone().requires_grad_() for name in self._trained}

    def arrays(self) -> dict[str, Tensor]:
        """All of the models' arrays [c, ...]: copies of trained parameters, views of what training does not change."""
        stacked = {name: self._shared(tensor) for name, tensor in self._arrays.items()}
        canonical = {param: name for name, param in self.model.named_parameters()}
        copies = {name: param.detach().clone() for name, param in self.params.items()}
        tied = self.model.named_parameters(remove_duplicate=False)
        return stacked | {name: copies[canonical[param]] for name, param in tied if param.requires_grad and name in stacked}

    def buffers(self) -> dict[str, Tensor]:
        """The models' arrays that are not trained [c, ...]: frozen parameters and persistent buffers."""
        return {name: self._shared(tensor) for name, tensor in self._arrays.items() if name not in self._trained}

    @property
    def untrained(self) -> frozenset[str]:
        """As ``Silo.untrained``; the same for all clients, since they share one computation."""
        return self._reach.untrained & self._arrays.keys()

    def batches(self, size: int, shuffle: bool = True, epochs: int = 1, steps: int | None = None) -> Iterator[Step]:
        """Each client's batches, side by side; see ``Silo.batches``. A client that has no more waits for the others."""
        lengths, as_they_are = self._silos.sizes, type(self.learner).train_view is Learner.train_view
        pairs = zip(self._clients, self._rngs, strict=True)
        streams = [visits(self.learner, lengths[client], size, shuffle, epochs, steps, rng) for client, rng in pairs]
        for places in zip_longest(*streams):
            step = self._gathered(places) if as_they_are else self._viewed(places)
            self.work = [done + size for done, size in zip(self.work, step.sizes, strict=True)]
            yield step

    def gradient(self, batches: Iterable[Step]) -> tuple[Tensor, dict[str, Tensor]]:
        """Each client's mean loss [c] over the examples of all its batches, and its gradient [c, ...] by parameter name.

        The clients share the weights, so none are copied.
        """
        shared, losses = {name: self._arrays[name] for name in self._trained}, Tally(len(self))
        differentiated = grad_and_value(self._followed, has_aux=True)
        sums: dict[str, Tensor] = {}
        for step in batches:
            gradients, (loss, parts) = self._mapped(differentiated, shared, None, step)
            self._note(loss, parts, losses, step)
            for name, gradient in gradients.items():
                weighted = _counting(gradient, step) * _along(step.counts, gradient)
                sums[name] = sums[name].add_(weighted) if name in sums else weighted
        return losses.means()["loss"], {name: total / _along(losses.examples, total) for name, total in sums.items()}

    def descend(self, batches: Iterable[Step], optimizer: dict[str, Any], penalty: Callable[[], Tensor] | None = None) -> Tensor:
        """One optimizer step a batch, in place; each client's mean loss [c] seen on the way, without the penalty.

        Losses and penalty are summed over the clients: the gradient of the sum holds each client's own. A client that has no
        more batches stays where it is.

        Raises:
            EngineError: the optimizer would mix the clients.
        """
        if not optimizers.is_element_wise(optimizer):
            raise EngineError(not_element_wise(optimizer))
        params, losses = list(self.params.values()), Tally(len(self))
        move = optimizers.Stepper(optimizer, self.params)
        for step in batches:
            loss, parts = self._mapped(self._loss, self.params, 0, step)
            self._note(loss, parts, losses, step)
            self._reach.follow(self.params, loss)
            total = loss.sum() if penalty is None else loss.sum() + penalty()
            gradients = torch.autograd.grad(total, params, allow_unused=True)
            with _finished_stay(params, step):
                move(gradients)
        return losses.means().get("loss", torch.zeros(len(self)))

    def loss_parts(self) -> dict[str, Tensor]:
        """The named parts of the loss [c], each a mean per example over the batches trained on."""
        return self._parts.means()

    # ---- the loss of one client, mapped over all ------------------------------------------------------------------

    def _mapped(self, function: Callable[..., Any], params: Named, params_dim: int | None, step: Step) -> Any:
        """``function`` of (params, fields, counted) for every client at once; ``counted`` is None where all examples count."""
        if step.even:
            return vmap(function, in_dims=(params_dim, 0, None))(params, step.fields, None)
        if not is_mean_over_examples(self.learner):
            raise EngineError(not_a_mean(self.learner, step.sizes))
        return vmap(function, in_dims=(params_dim, 0, 0))(params, step.fields, step.counted)

    def _followed(self, params: Named, fields: Named, counted: Bool[Tensor, "b"] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """``_loss``, noting what it reaches: a gradient from ``torch.func`` is zero where there is none."""
        loss, parts = self._loss(params, fields, counted)
        self._reach.follow(params, loss)
        return loss, parts

    def _loss(self, params: Named, fields: Named, counted: Bool[Tensor, "b"] | None) -> tuple[Tensor, dict[str, Tensor]]:
        """One client's loss on one batch, and its parts; the mean over those of its examples that count."""
        if counted is None:
            return self._loss_of_all(params, fields)
        of_one = vmap(lambda one: self._loss_of_all(params, {name: value[None] for name, value in one.items()}))
        loss, parts = of_one(fields)
        return _mean(loss, counted), {name: _mean(part, counted) for name, part in parts.items()}

    def _loss_of_all(self, params: Named, fields: Named) -> tuple[Tensor, dict[str, Tensor]]:
        values = {**self._fixed, **params}
        placed = {place: values[name] for place, name in self._places.items() if name in values}

        def called(*inputs: Any, **options: Any) -> Any:
            return functional_call(self.model, placed, inputs, options, tie_weights=False)

        loss = self.learner.loss(called, Examples(fields), self.progress, torch.Generator())  # vmap refuses all draws
        return loss.total, dict(loss.parts)

    @cached_property
    def _fixed(self) -> dict[str, Tensor]:
        """The arrays that are not trained, each under one name."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: self._arrays[name] for name, _ in named if name in self._arrays and name not in self._trained}

    @cached_property
    def _places(self) -> dict[str, str]:
        """The name of the tensor at each place of the model; tied ones have several places.

        ``functional_call`` ties weights too, but does not put a module back that has two names (torch 2.14).
        """
        names = {tensor: name for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]}
        modules = list(self.model.named_modules())
        params = {place: param for prefix, module in modules for place, param in module.named_parameters(prefix, recurse=False)}
        buffers = {place: buffer for prefix, module in modules for place, buffer in module.named_buffers(prefix, recurse=False)}
        return {place: names[tensor] for place, tensor in {**params, **buffers}.items()}

    def _shared(self, tensor: Tensor) -> Tensor:
        """A view [c, ...] of what all clients have in common."""
        return tensor.expand(len(self), *tensor.shape)

    def _note(self, loss: Tensor, parts: Named, losses: "Tally", step: Step) -> None:
        losses.add({"loss": loss}, step)
        self._parts.add(parts, step)

    # ---- batches --------------------------------------------------------------------------------------------------

    def _gathered(self, places: Sequence[Place | None]) -> Step:
        """The examples at these places, as they are: one look-up for all clients."""
        everything, starts = self._silos.examples, (self._silos.offsets[client] for client in self._clients)
        sizes = tuple(0 if place is None else _length(place) for place in places)
        index = torch.stack([_filled(place, max(sizes)) + start for place, start in zip(places, starts, strict=True)])
        index = index.to(everything.device)
        return Step(everything[index].decoded().fields, sizes)

    def _viewed(self, places: Sequence[Place | None]) -> Step:
        """The learner's views of the examples at these places, each drawn from its client's generator."""
        each = zip(places, self._clients, self._rngs, strict=True)
        drawn = self.learner.draw
        views = [None if place is None else drawn(self.model, self._silos[client], place, rng) for place, client, rng in each]
        sizes = tuple(0 if view is None else len(view) for view in views)
        filler = next(view for view in views if view is not None)
        _check_same_fields(view for view in views if view is not None)
        rows = [_filled(None if view is None else slice(0, len(view)), max(sizes)) for view in views]
        chosen = [(filler if view is None else view)[row] for view, row in zip(views, rows, strict=True)]
        return Step({name: torch.stack([one.fields[name] for one in chosen]) for name in filler.fields}, sizes)


class Tally:
    """Each client's means over its examples of its batches' means.

    Args:
        clients: how many.
    """

    def __init__(self, clients: int) -> None:
        self._clients = clients
        self._examples: Tensor | None = None
        self._sums: dict[str, Tensor] = {}

    @property
    def examples(self) -> Int[Tensor, "c"]:
        """How many examples each client has counted, or 1."""
        return torch.ones(self._clients) if self._examples is None else self._examples.clamp(min=1)

    def add(self, means: Named, step: Step) -> None:
        """Count one batch of each client that has one."""
        self._examples = step.counts if self._examples is None else self._examples + step.counts
        for name, mean in means.items():
            total = _counting(mean.detach().double(), step) * step.counts
            self._sums[name] = self._sums[name].add_(total) if name in self._sums else total

    def means(self) -> dict[str, Float[Tensor, "c"]]:
        """The means so far."""
        return {name: total / self.examples for name, total in self._sums.items()}


def not_element_wise(optimizer: Mapping[str, Any]) -> str:
    """Why an optimizer is refused, and the remedy."""
    fact = f"the optimizer {optimizer['name']} does not move each element on its own, so that stacked clients would mix"
    return f"{fact}; {ONE_BY_ONE}, or use SGD, Adam, AdamW, ..."


def not_a_mean(learner: Learner, sizes: Collection[int]) -> str:
    """Why a learner is refused on clients of these sizes, and the remedy."""
    fact = f"clients of {min(sizes)} to {max(sizes)} examples cannot be stacked"
    return f"{fact}, since the loss of {type(learner).__name__} is not declared @mean_over_examples; {ONE_BY_ONE}, or deal equal sizes"


def _check_same_fields(views: Iterable[Examples]) -> None:
    """Refuse batches that cannot be stacked, since some have what others lack."""
    kinds = {tuple(sorted(view.fields)) for view in views}
    if len(kinds) > 1:
        one, other, *_ = sorted(kinds)
        raise EngineError(f"the batches of clients that train together have the fields {[*one]} and {[*other]}; {ONE_BY_ONE}")


def _length(place: Place) -> int:
    return place.stop - place.start if isinstance(place, slice) else len(place)


def _filled(place: Place | None, length: int) -> Int[Tensor, "length"]:
    """The indices of a batch, filled up to ``length`` with its first; of a client without a batch, the first of all."""
    if place is None:
        return torch.zeros(length, dtype=torch.int64)
    index = torch.arange(place.start, place.stop) if isinstance(place, slice) else place
    return torch.cat([index, index[:1].expand(length - len(index))])


def _mean(values: Float[Tensor, "b"], counted: Bool[Tensor, "b"]) -> Float[Tensor, ""]:
    return torch.where(counted, values, 0).sum() / counted.sum().clamp(min=1)


def _along(vector: Tensor, like: Tensor) -> Tensor:
    """A vector [c], in the shape [c, 1, ...] in which it broadcasts against ``like`` [c, ...]."""
    return vector.reshape(-1, *[1] * (like.dim() - 1))


def _counting(values: Float[Tensor, "c ..."], step: Step) -> Float[Tensor, "c ..."]:
    """The values of clients that have a batch at this step, and 0 for the others."""
    return torch.where(_along(step.counts > 0, values), values, 0) if 0 in step.sizes else values


@contextmanager
def _finished_stay(params: Sequence[Tensor], step: Step) -> Iterator[None]:
    """Whatever the block does to the stacked ``params``, clients without a batch at this step have them unchanged after it."""
    if 0 not in step.sizes:
        yield
        return
    before = [param.detach().clone() for param in params]
    yield
    with torch.no_grad():
        for param, old in zip(params, before, strict=True):
            param.copy_(torch.where(_along(step.counts > 0, param), param, old))
