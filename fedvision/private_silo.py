"""A learner at work under example-level differential privacy: Poisson-sampled batches, clipped per-example gradients, noise."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedvision.data import Examples
from fedvision.errors import EngineError
from fedvision.learners.learner import Learner
from fedvision.optimizers import Stepper
from fedvision.privacy import RECORD, Ledger, Privacy, clipped_sum, clipping_factors, entropy
from fedvision.silo import Silo, step_count

TOLERANCE = 1e-3
"""By how much a gradient of norm 1 may differ in a batch; a dependence on other examples shows more."""

REMEDY = "use GroupNorm or LayerNorm, as classifier does of timm's models if learner.normalization = 'group'"

BatchLoss = Callable[[], Tensor]
"""The mean loss over the n examples of a batch, computed anew by the model."""


class PrivateSilo(Silo):
    """A client whose answer is differentially private in its training examples, given how many there are.

    At each of the steps that a plain client would take, each example is in the batch with probability q = batch size / examples,
    independently; the step is along (sum of clipped per-example gradients + noise) / expected batch size. What else would tell of the
    examples stays here: losses, their parts, how large the batches were, what was not trained.

    Args:
        arguments: as ``Silo`` takes them; what was spent is kept in its ``state``.
        privacy: of the experiment.
        rounds: planned, in all of which the client may take part.
        named: as ``Silo`` takes them.

    Source: Abadi et al., arXiv 1607.00133, algorithm 1.
    """

    def __init__(self, *arguments: Any, privacy: Privacy, rounds: int, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._privacy, self._rounds = privacy, rounds
        self._ledger = Ledger.of(self.state)
        self._entropy = entropy(privacy.secure, self.rng)
        self._expected, self._noise = 0, 0.0

    @property
    def untrained(self) -> frozenset[str]:
        """Nothing: there is noise in every parameter."""
        return frozenset()

    @property
    def epsilon(self) -> float:
        """What this client has spent in all rounds so far."""
        return self._ledger.epsilon(self._privacy.delta, self._privacy.accountant)

    def loss_parts(self) -> dict[str, float]:
        """Nothing: they are of the examples."""
        return {}

    def loss(self, model: Callable[..., Any], batch: Examples) -> Tensor:
        """Refused: what is made of it would not be covered."""
        raise EngineError("under [privacy] unit = 'example' a client_update that uses silo.loss is not covered; use silo.descend")

    def gradient(self, batches: Iterable[Examples]) -> tuple[float, dict[str, Tensor]]:
        """Refused: a gradient of all examples is not covered."""
        raise EngineError("under [privacy] unit = 'example' a client_update that uses silo.gradient is not covered; use silo.descend")

    def batches(self, size: int, shuffle: bool = True, epochs: int = 1, steps: int | None = None) -> Iterator[Examples]:
        """As many batches as a plain silo would make, Poisson-sampled: of ``size`` examples on average, and some may be empty."""
        examples = len(self.train)
        total, self._expected = step_count(examples, size, epochs, steps), min(size, examples)
        rate = self._expected / examples
        self._noise = self._privacy.noise(rate, self._rounds * total) if not self._ledger.entries else self._ledger.entries[-1][0]
        self._ledger = self._ledger.spent(self._noise, rate, total)
        self.state[RECORD] = self._ledger.record()
        self.work += total * self._expected
        for step in range(total):
            self.progress = self._begun + self._span * step / total
            index = (self._entropy.fractions(examples) < rate).nonzero()[:, 0].to(self.train.device)
            yield viewed(self.learner, self.train, index, self.rng)

    def descend(self, batches: Iterable[Examples], optimizer: dict[str, Any], penalty: Callable[[], Tensor] | None = None) -> float:
        """One noisy optimizer step a batch, in place; in place of the mean loss, which is not told, NaN."""
        trained = self._trained
        params = list(trained.values())
        step = Stepper(optimizer, trained, self.learner.groups(self.model), self.state)
        with PerExample(self.model, self._privacy.clipping) as per_example:
            for batch in batches:
                gradients = self._noisy(self._clipped(per_example, batch, params), params)
                if penalty is not None:
                    extra = torch.autograd.grad(penalty(), params, allow_unused=True)
                    gradients = [whole if more is None else whole + more for whole, more in zip(gradients, extra, strict=True)]
                step(gradients, self.progress)
        step.end()
        return math.nan

    def _clipped(self, per_example: "PerExample", batch: Examples, params: Sequence[Tensor]) -> list[Tensor]:
        if not len(batch):
            return [torch.zeros_like(param) for param in params]
        return per_example.clipped_sum(lambda: super(PrivateSilo, self).loss(self.model, batch), len(batch), self._privacy.clipping_norm)

    def _noisy(self, sums: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
        """Noise added to sums of clipped gradients, over the expected number of examples: never over how many there were."""
        if not self._noise:
            return [total / self._expected for total in sums]
        spread = self._noise * self._privacy.clipping_norm
        return [(total + spread * self._entropy.gaussian(param)) / self._expected for total, param in zip(sums, params, strict=True)]


def viewed(learner: Learner, train: Examples, index: Tensor, rng: torch.Generator) -> Examples:
    """The training views of the examples at ``index``, each made by itself, so that no example is in the view of another."""
    if type(learner).train_view is Learner.train_view or not len(index):
        return train[index].decoded()
    views = [learner.train_view(train[one].decoded(), rng) for one in index.split(1)]
    return Examples({name: torch.cat([view.fields[name] for view in views]) for name in views[0].fields})


class PerExample:
    """The per-example gradients of a model, by opacus' hooks; within a ``with`` block, after which the model is as it was.

    Args:
        model: in training mode; each row of its output must depend on one example only.
        clipping: as ``Privacy`` has it.
    """

    def __init__(self, model: nn.Module, clipping: str = "auto") -> None:
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
        from opacus.grad_sample.grad_sample_module import GradSampleHooks
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping

        assert GradSampleModule.GRAD_SAMPLERS and GradSampleModuleFastGradientClipping.NORM_SAMPLERS
        self._model = model
        self._params = [param for param in model.parameters() if param.requires_grad]
        self.ghost = clipping == "ghost" or (clipping == "auto" and not without_ghost_norms(model))
        self._hooks: Any = (GradSampleHooksFastGradientClipping if self.ghost else GradSampleHooks)(model, loss_reduction="mean")
        self._hook_outputs()

    def __enter__(self) -> "PerExample":
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.cleanup()
        self._forget()
        for module in self._model.modules():
            for left in ("activations", "max_batch_len"):
                if hasattr(module, left):
                    delattr(module, left)
        for param in self._params:
            for left in ("_norm_sample", "_current_grad_sample", "grad_sample", "_forward_counter"):
                if hasattr(param, left):
                    delattr(param, left)

    def clipped_sum(self, loss: BatchLoss, examples: int, clipping_norm: float) -> list[Tensor]:
        """The sum of a batch's per-example gradients, each clipped; one tensor a parameter that learns."""
        return self._by_norms(loss, examples, clipping_norm) if self.ghost else self._formed(loss, clipping_norm)

    def _hook_outputs(self) -> None:
        """Follow outputs themselves, over which the model may write as ResNets do; with opacus' own backward hooks it could not."""
        handles = self._hooks.autograd_grad_sample_hooks
        for module, backward in zip(self._hooks.iterate_submodules(self._model), handles[1::2], strict=True):
            backward.remove()
            handles.append(module.register_forward_hook(self._follow))

    def _follow(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: self._hooks.capture_backprops_hook(module, None, (gradient,), "mean", True))

    def _formed(self, loss: BatchLoss, clipping_norm: float) -> list[Tensor]:
        """By forming every gradient."""
        with _quiet():
            loss().backward()
        held = [param for param in self._params if param.grad_sample is not None]  # type: ignore[attr-defined]
        sums = clipped_sum([param.grad_sample for param in held], clipping_norm)  # type: ignore[attr-defined]
        found = dict(zip(held, sums, strict=True))
        self._forget()
        return [found.get(param, torch.zeros_like(param)) for param in self._params]

    def _by_norms(self, loss: BatchLoss, examples: int, clipping_norm: float) -> list[Tensor]:
        """By their norms: the output's rows are weighted by the clipping factors, and followed back a second time.

        With outputs z_i and the loss l = mean l_i(z_i), the row i of dl/dz is (dl_i/dz_i) / n, so that n f_i dl/dz_i leads to sum f_i g_i.
        """
        with _outputs(self._model) as outputs:
            total = loss()
        [output] = outputs
        output.retain_grad()
        with _quiet():
            total.backward(retain_graph=True)
        factors = clipping_factors(self._hooks.get_norm_sample(), clipping_norm) * examples
        assert output.grad is not None
        weighted = output.grad * factors.reshape(-1, *[1] * (output.dim() - 1))
        self._hooks.disable_hooks()
        with _quiet():
            sums = torch.autograd.grad(output, self._params, weighted, materialize_grads=True)
        self._hooks.enable_hooks()
        self._forget()
        return list(sums)

    def _forget(self) -> None:
        for param in self._params:
            param.grad = None
            param.grad_sample = None  # type: ignore[attr-defined]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that attention is mapped example by example."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield


@contextmanager
def _outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """What a model returns within the block."""
    outputs: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


def without_ghost_norms(model: nn.Module) -> list[str]:
    """The modules that learn and of whose gradients opacus cannot tell the norms without forming them."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    known = GradSampleModuleFastGradientClipping.NORM_SAMPLERS
    return [name or "the model" for name, module in model.named_modules() if _learns(module) and type(module) not in known]


def incompatible(model: nn.Module) -> str | None:
    """The first layer that rules out per-example gradients, and why; None if there is none."""
    from opacus.validators import ModuleValidator

    fault = remembering(model)
    if fault is not None:
        return fault
    for name, module in model.named_modules():
        own = [buffer for buffer, _ in module.named_buffers(recurse=False)]
        validate = ModuleValidator.VALIDATORS.get(type(module)) if _learns(module) else None
        errors = validate(module) if validate is not None else []
        if errors:
            return f"layer {name!r} ({type(module).__name__}) is refused by opacus: {str(errors[0]).split('. ', 1)[0]}"
        if own and _learns(module):
            return f"layer {name!r} ({type(module).__name__}) learns and has a buffer, {own[0]!r}, which nothing protects"
    return None


def remembering(model: nn.Module) -> str | None:
    """The first layer that mixes the examples of a batch or keeps statistics of them, as BatchNorm does; None if there is none."""
    for name, module in model.named_modules():
        if hasattr(module, "running_mean") and (module.running_mean is not None or isinstance(module, nn.modules.batchnorm._BatchNorm)):
            return f"layer {name!r} ({type(module).__name__}) mixes the examples of a batch or remembers them; {REMEDY}"
    return None


def mixing(learner: Learner, model: nn.Module, few: Examples, clipping: str) -> str | None:
    """Whether opacus' gradients in a batch are other ones than torch's of single examples, found out by trying; None if they are the same.

    Args:
        learner: whose loss it is.
        model: of the learner; left as it is.
        few: some examples.
        clipping: as ``Privacy`` has it.
    """
    rng = torch.Generator().manual_seed(0)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    batch = viewed(learner, few, torch.arange(len(few), device=few.device), rng)

    def loss(part: Examples) -> Tensor:
        return learner.loss(model, part, 0.0, rng).total

    was_training = model.training
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()  # whose draws differ
    with PerExample(model, clipping) as per_example:
        together = per_example.clipped_sum(lambda: loss(batch), len(batch), 1.0)
    learning = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    params = [param for _, param in learning]
    alone = [torch.autograd.grad(loss(batch[i : i + 1]), params, materialize_grads=True) for i in range(len(batch))]
    model.train(was_training)
    changed = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
    if changed:
        return f"training changes the buffer {changed[0]!r}, which nothing protects"
    expected = clipped_sum([torch.stack(parts) for parts in zip(*alone, strict=True)], 1.0)
    for (name, _), whole, sole in zip(learning, together, expected, strict=True):
        if not torch.allclose(whole, sole, rtol=TOLERANCE, atol=TOLERANCE):
            return f"the gradient of {name!r} of an example depends on what else is in its batch, or opacus computes another one"
    return None


def _learns(module: nn.Module) -> bool:
    return any(param.requires_grad for param in module.parameters(recurse=False))
