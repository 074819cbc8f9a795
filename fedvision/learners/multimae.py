"""MultiMAE: predicting the patches of several modalities that were not shown, to learn what holds them together.

The modalities of a picture are cut into patches, of which an encoder sees a few, shared out by a Dirichlet draw; for each
modality a decoder predicts all patches, and counts for those that were masked:

    l = sum over modalities of the mean error at their masked patches

Source: arXiv 2204.01678; what the paper leaves open from what its public checkpoints and implementation do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fedvision.data.examples import IGNORED, Examples
from fedvision.data.federated import Spec
from fedvision.errors import DataError, ExperimentError
from fedvision.gallery import Gallery
from fedvision.learners.learner import Loss
from fedvision.learners.multimodal import Multimodal, Names
from fedvision.metrics import Metrics, confusion
from fedvision.multimae import losses
from fedvision.multimae.decoders import DecoderSize
from fedvision.multimae.masking import Masks, drawn, masks_of
from fedvision.multimae.modalities import DEPTH_NAME, RGB_NAME, SEMSEG_NAME, Modality
from fedvision.multimae.model import NORM_RGB, Autoencoder
from fedvision.multimae.pictures import Subject, galleries
from fedvision.multimae.transformer import initialized
from fedvision.multimae.views import Moves, Values, as_seen, present, raw
from fedvision.multimae.weights import initialized_from
from fedvision.registry import learners
from fedvision.seeds import global_generators, own_generator
from fedvision.settings import Count, Positive, PositiveFraction

VISIBLE = "visible"
"""The field of a batch that says which patches the encoder sees, int64 [n, visible], as indices into those of all modalities."""

ERRORS: Mapping[str, Callable[..., Float[Tensor, "b h w"]]] = {
    "mse": losses.squared_errors,
    "l1": losses.absolute_errors,
    "cross-entropy": losses.class_errors,
}


Term = tuple[Float[Tensor, "b h w"], Bool[Tensor, "b h w"]]
"""Errors, and which of them count."""


class Translation(NamedTuple):
    """What is measured of one."""

    shares: dict[str, tuple[Tensor, Tensor]]
    tables: dict[str, Tensor]


@learners("multimae")
@dataclass(frozen=True, kw_only=True)
class MultiMAE(Multimodal):
    """Pre-training on pictures of several modalities, without labels: predict the patches that were masked.

    A silo learns from the modalities that it has: what no picture of a batch has is neither an input nor a target there, and a
    picture that lacks one shows more of the others.

    Attributes:
        inputs: the modalities that the encoder may see: ``rgb``, ``depth``, ``semseg``, or of ``modalities``.
        outputs: those that are predicted.
        normalized_rgb: whether a further decoder predicts rgb with each patch standardized.
        decoder_width: of the decoders' tokens.
        decoder_depth: number of their blocks after the cross-attention.
        decoder_heads: of their attention.
        visible: patches that the encoder sees, of all modalities together; a sixth of those of all ``inputs`` if not given.
        alpha: concentration of the Dirichlet draw that shares them out; a large one shares equally.
        subsets: whether a random subset of the modalities is drawn first.
        translations: pairs of modalities such as ["depth", "semseg"]: evaluation tells how well the second is predicted from the
            whole first alone.

    Source: arXiv 2204.01678, section 3 and appendix; the defaults are the paper's, whose ``encoder`` is ``base``. The other
        half of the recipe belongs to the strategy: AdamW (0.9, 0.95) with weight decay 0.05 on all parameters, rate 1e-4 for each
        256 pictures of a batch, schedule ``warmup-cosine``.
    Differs: float32 throughout; pictures without any masked patch of a modality count for nothing there, where the public
        implementation's gradient is NaN; classes of pixels that are not known (255) are no targets.
    """

    learns_unlabeled = True
    inputs: Names = (RGB_NAME, DEPTH_NAME, SEMSEG_NAME)
    outputs: Names = (RGB_NAME, DEPTH_NAME, SEMSEG_NAME)
    normalized_rgb: bool = True
    decoder_width: Count = 256
    decoder_depth: Count = 2
    decoder_heads: Count = 8
    visible: Count | None = None
    alpha: Positive = 1.0
    subsets: bool = False
    crop_scale: tuple[PositiveFraction, PositiveFraction] = (0.2, 1.0)
    translations: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        self.check_named("inputs", self.inputs)
        self.check_named("outputs", self.outputs)
        for source, target in self.translations:
            if source not in self.inputs or target not in self.outputs:
                fact = f"learner.translations has {source!r} to {target!r}"
                raise ExperimentError(f"{fact}; choose of the inputs {list(self.inputs)} and of the outputs {list(self.outputs)}")

    # ---- the model -----------------------------------------------------------------------------------------------

    def build(self, spec: Spec, rng: torch.Generator) -> Autoencoder:
        """The network, with adapters and decoders of all modalities.

        Raises:
            ExperimentError: data that are no images, or that lack a field; sizes that do not fit together; a checkpoint that does not.
        """
        decoder = DecoderSize(self.decoder_width, self.decoder_depth, self.decoder_heads)
        where = "learner.inputs and learner.outputs"
        inputs, outputs = (self.of_data(spec, [self.known[name] for name in names], where) for names in (self.inputs, self.outputs))
        grid = self.positions(spec)
        with global_generators(rng):
            model = Autoencoder(inputs, outputs, self.size, decoder, self.patch, grid, self.normalized_rgb, self.global_tokens)
        initialized(model, rng)
        if self.checkpoint is not None:
            initialized_from(model, self.checkpoint, decoders=True)
        return model

    @property
    def _used(self) -> dict[str, Modality]:
        """The modalities that are seen or predicted, by name, inputs first."""
        return {name: self.known[name] for name in dict.fromkeys((*self.inputs, *self.outputs))}

    # ---- batches -------------------------------------------------------------------------------------------------

    def train_view(self, batch: Examples, rng: torch.Generator) -> Examples:
        """The modalities that the batch has, moved and normalized, and which patches are visible.

        Returns:
            By modality, as ``Autoencoder`` takes them; ``visible`` int64 [n, visible], indices into the patches of the inputs among
            them, in the order of ``inputs``.
        """
        return self._seen(batch, self.moves, rng, [rng])

    def _seen(self, batch: Examples, moves: Moves, moving: torch.Generator | None, masking: Sequence[torch.Generator]) -> Examples:
        """The batch as the network sees it.

        Args:
            batch: as it is stored.
            moves: of the pictures.
            moving: for the moves; None: they are only resized.
            masking: for the masks: one generator for all examples, or one for each.
        """
        values = as_seen(moves(raw(batch, self._used.values()), moving), self._used)
        held = torch.tensor([name in values for name in self.inputs])
        if not held.any():
            fact = f"a batch has none of the modalities {', '.join(self.inputs)}, but the fields {', '.join(batch.fields)}"
            raise DataError(f"{fact}; give every silo one of learner.inputs")
        patches = self._grid(values).numel()
        counts, there = dict.fromkeys(self.inputs, patches), present(batch, [self._used[name] for name in self.inputs])
        pairs = zip(there.tensor_split(len(masking)), masking, strict=True)
        visible = torch.cat([drawn(counts, part, self._shown(patches), self.alpha, rng, self.subsets) for part, rng in pairs])
        places = held.repeat_interleave(patches).cumsum(0) - 1  # of all patches among those that the batch has
        return Examples({**values, VISIBLE: places[visible].to(batch.device)})

    def _shown(self, patches: int) -> int:
        """How many patches are visible, if each modality has so many."""
        return self.visible or max(1, round(patches * len(self.inputs) / 6))

    def _grid(self, values: Mapping[str, Tensor]) -> torch.Size:
        """Rows and columns of patches of a batch as the network sees it."""
        name, held = next((name, held) for name, held in values.items() if name in self.known)
        cell = self.known[name].cell(self.patch)
        return torch.Size(side // cell for side in held.shape[-2:])

    # ---- loss ----------------------------------------------------------------------------------------------------

    def loss(self, model: Callable[..., Any], batch: Examples, progress: float, rng: torch.Generator) -> Loss:
        """The sum of the masked losses of all modalities that the batch has; its parts, each by itself.

        Where it has nothing to predict the loss is a 0 that depends on no weight, and teaches none.

        Source: arXiv 2204.01678, section 3.4. Tasks are not weighted.
        """
        parts = {name: losses.masked_loss(*term) for name, term in self._terms(model, batch).items()}
        if not parts:
            return Loss(torch.zeros((), requires_grad=True))
        return Loss(torch.stack(list(parts.values())).sum(), parts)

    def _terms(self, model: Callable[..., Any], batch: Examples) -> dict[str, Term]:
        """By output: the error of each value, and whether it counts: where it is known and its patch is masked."""
        inputs = {name: batch.fields[name] for name in self.inputs if name in batch}
        targets = self._targets(batch)
        if not targets:
            return {}
        predictions = model(inputs, batch.fields[VISIBLE], list(targets))
        grid = self._grid(batch.fields)
        spans = {name: slice(i * grid.numel(), (i + 1) * grid.numel()) for i, name in enumerate(inputs)}
        masks = masks_of(batch.fields[VISIBLE], spans)
        return {name: self._term(name, predictions[name], target, masks, grid) for name, target in targets.items()}

    def _targets(self, batch: Examples) -> Values:
        """What each decoder is to predict."""
        targets = {name: batch.fields[name] for name in self.outputs if name in batch}
        if self.normalized_rgb and RGB_NAME in targets:
            targets[NORM_RGB] = losses.standardized_patches(targets[RGB_NAME], self.patch)
        return targets

    def _term(self, name: str, prediction: Tensor, target: Tensor, masks: Masks, grid: torch.Size) -> Term:
        modality = self.known[RGB_NAME if name == NORM_RGB else name]
        errors, counted = ERRORS[modality.loss](prediction, target), losses.known(target)
        if modality.name in masks:
            counted = counted & losses.spread(masks[modality.name], tuple(grid), modality.cell(self.patch))  # type: ignore[arg-type]
        return errors, counted

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, model: nn.Module, batch: Examples) -> Metrics:
        """The loss and its parts, under masks that are always the same for a picture; of each translation its error, and mIoU.

        A part is a mean over the examples that have the modality, the loss the mean over all of the sum of their parts. Of a batch
        that has nothing to predict nothing is measured.
        """
        seen = self._seen(batch, Moves(resolution=self.resolution), None, [own_generator(example) for example in batch.image])
        means = {name: losses.masked_means(*term) for name, term in self._terms(model, seen).items()}
        if not means:
            return Metrics(0, {})
        shares = {name: (each.sum(), there.sum()) for name, (each, there) in means.items()}
        loss = torch.stack([each for each, _ in means.values()]).double().sum()
        tables: dict[str, Tensor] = {}
        for source, target in self.translations:
            if source in seen and target in seen:
                found = self._translated(model, seen, source, target)
                shares |= found.shares
                tables |= found.tables
        return Metrics.of_batch({"loss": loss}, len(batch), shares=shares, confusions=tables)

    def _translated(self, model: nn.Module, seen: Examples, source: str, target: str) -> Translation:
        """How well one modality is predicted from another alone, where both are there."""
        there = losses.known(seen.fields[source]).flatten(1).any(1)
        prediction, truth = model({source: seen.fields[source]}, None, [target])[target], seen.fields[target]
        modality, name = self.known[target], f"{source}_to_{target}"
        counted = losses.known(truth) & there[:, None, None]
        means, any_known = losses.masked_means(ERRORS[modality.loss](prediction, truth), counted)
        shares = {f"{name}_{modality.loss.replace('-', '_')}": (means.sum(), any_known.sum())}
        if modality.kind != "classes":
            return Translation(shares, {})
        void = torch.where(counted, truth, IGNORED)
        return Translation(shares, {f"{name}_": confusion(void, prediction.argmax(1), modality.channels)})

    def pictures(self, model: nn.Module, examples: Examples) -> Mapping[str, Gallery]:
        """What is predicted from one modality alone, from few to many patches, and after a patch was changed.

        Examples that lack none of what the others have come first.
        """
        assert isinstance(model, Autoencoder)
        values = as_seen(Moves(resolution=self.resolution)(raw(examples, self._used.values())), self._used)
        lacking = torch.stack([~losses.known(held).flatten(1).any(1) for held in values.values()]).sum(0)
        order = lacking.argsort(stable=True).tolist()
        subjects = [Subject(model, {name: held[i : i + 1] for name, held in values.items()}, self._used) for i in order]
        return galleries(subjects, self._shown(self._grid(values).numel()))
