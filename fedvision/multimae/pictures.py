"""Pictures of what a pre-trained network makes of one modality, of few and of many patches, and of a patch that was changed.

Classes have the same colors in every picture; a prediction of depth has the colors of its target's range. Where a patch was visible
a prediction shows it as it was given, since no loss was ever computed there.

Source: after figures 1, 2 and 4 of arXiv 2204.01678.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fedvision.colors import NOTHING, palette
from fedvision.data.examples import IGNORED
from fedvision.gallery import Gallery, Picture
from fedvision.multimae.losses import known, spread
from fedvision.multimae.modalities import Modality
from fedvision.multimae.model import Autoencoder
from fedvision.multimae.views import Values, image_normalization
from fedvision.seeds import generator

Shown = Mapping[str, Bool[Tensor, "n"]]
"""By input: which patches are visible; none of an input that is not named."""

COVER = 128
"""The gray of patches that are masked."""

TINTS = {"red": (1.0, 0.2, 0.15), "blue": (0.15, 0.3, 1.0)}
"""The colors that a patch is given."""


@dataclass(frozen=True)
class Subject:
    """One example, and the network that looks at it.

    Attributes:
        model: in evaluation mode.
        values: by modality, as the network sees them, each [1, ...].
        modalities: by name.
    """

    model: Autoencoder
    values: Values
    modalities: Mapping[str, Modality]

    @property
    def inputs(self) -> list[str]:
        """The modalities that are there and that the network takes."""
        return [name for name in self.model.modalities if name in self.values]

    @property
    def outputs(self) -> list[str]:
        """The modalities that are there and that the network predicts."""
        return [name for name in self.values if name in self.model.output_adapters]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.model.grid({name: self.values[name] for name in self.inputs})

    @property
    def patches(self) -> int:
        """Patches of each modality."""
        return self.grid[0] * self.grid[1]

    def whole(self, *names: str) -> Shown:
        """All patches of some inputs, and none of the others."""
        return {name: torch.full((self.patches,), name in names) for name in self.inputs}

    def predicted(self, shown: Shown) -> Values:
        """Every output, with the visible patches as they were given."""
        given = {name: self.values[name] for name in self.inputs}
        seen = torch.cat([shown.get(name, torch.zeros(self.patches, dtype=torch.bool)) for name in given])
        visible = seen.nonzero().T.to(self.model.global_tokens.device)
        raw = self.model(given, visible, self.outputs)
        return {name: self._pasted(name, values, shown.get(name)) for name, values in raw.items()}

    def _pasted(self, name: str, prediction: Tensor, shown: Bool[Tensor, "n"] | None) -> Tensor:
        modality, target = self.modalities[name], self.values[name]
        values = prediction.argmax(1) if modality.kind == "classes" else prediction
        if shown is None:
            return values
        there = self.pixels(name, shown) & known(target)
        return torch.where(there if values.ndim == 3 else there[:, None], target, values)

    def pixels(self, name: str, shown: Bool[Tensor, "n"]) -> Bool[Tensor, "1 h w"]:
        """The values of a modality that are in some of its patches."""
        return spread(shown[None], self.grid, self.modalities[name].cell(self.model.patch)).to(self.values[name].device)

    # ---- painting ------------------------------------------------------------------------------------------------

    def target(self, name: str) -> Picture:
        """A modality as it is."""
        return self.painted(name, self.values[name])

    def covered(self, name: str, shown: Shown) -> Picture:
        """A modality with a cover over the patches that are not visible."""
        pixels = _enlarged(self.pixels(name, shown.get(name, torch.zeros(self.patches, dtype=torch.bool)))[0].cpu(), self._stride(name))
        return np.where(pixels[..., None], self.target(name), np.uint8(COVER))

    def painted(self, name: str, values: Tensor) -> Picture:
        """Values of a modality in color, one pixel a pixel of the picture."""
        modality, one = self.modalities[name], values[0].cpu()
        if modality.kind == "classes":
            return np.asarray(palette()[_enlarged(one, modality.stride)])
        if modality.kind == "image":
            colors = _three(image_normalization(len(one)).undone(one))
        else:
            colors = _heat(one.mean(0), self.values[name][0].cpu().mean(0))
        return _enlarged(_bytes(colors, known(values.cpu())[0]), self._stride(name))

    def _stride(self, name: str) -> int:
        return self.modalities[name].stride


# ---- galleries ------------------------------------------------------------------------------------------------------


def galleries(subjects: Sequence[Subject], visible: int) -> dict[str, Gallery]:
    """The three pictures, as far as the modalities of the examples allow.

    Args:
        subjects: examples; the first few are shown.
        visible: patches that the encoder sees in training.
    """
    drawn = {}
    if len({*subjects[0].inputs, *subjects[0].outputs}) > 1:
        drawn["single-input"] = single_input(subjects[:2])
    drawn["visible-patches"] = visible_patches(subjects[:2], visible)
    edits = edited_patch(subjects[:2])
    return drawn if edits is None else {**drawn, "edited-patch": edits}


def single_input(subjects: Sequence[Subject]) -> Gallery:
    """One modality given whole, and what is predicted of all others, above their targets."""
    outputs = subjects[0].outputs
    rows: dict[str, list[Picture | None]] = {}
    for number, subject in enumerate(subjects):
        for name in subject.inputs:
            predictions = subject.predicted(subject.whole(name))
            cells = [None if other == name else subject.painted(other, predictions[other]) for other in outputs]
            rows[f"{number}: from {name}"] = [subject.target(name), *cells]
        rows[f"{number}: target"] = [None, *(subject.target(name) for name in outputs)]
    caption = "Of each test picture one modality is given whole; the network predicts the others."
    return Gallery(list(rows), ["given", *outputs], list(rows.values()), caption)


def visible_patches(subjects: Sequence[Subject], visible: int) -> Gallery:
    """Few to many patches visible, drawn of all modalities alike, each time those of before and some more."""
    first = subjects[0]
    names = list(dict.fromkeys((*first.inputs, *first.outputs)))
    rows: dict[str, list[Picture | None]] = {}
    for number, subject in enumerate(subjects):
        total = subject.patches * len(subject.inputs)
        order = torch.randperm(total, generator=generator(0, "pictures", number))
        for count in sorted({max(visible // 2, 1), visible, min(2 * visible, total), max(min(4 * visible, 3 * total // 4), 1)}):
            seen = torch.zeros(total, dtype=torch.bool).index_fill(0, order[:count], True)
            shown = dict(zip(subject.inputs, seen.split(subject.patches), strict=True))
            rows[f"{number}: {count} of {total}"] = _triples(subject, names, shown)
    columns = [f"{name}: {what}" for name in names for what in ("given", "predicted", "target")]
    caption = f"More and more patches are given (training gives {visible}); what is gray was masked."
    return Gallery(list(rows), columns, list(rows.values()), caption)


def edited_patch(subjects: Sequence[Subject]) -> Gallery | None:
    """One patch changed, and what becomes of the predictions; None if there is nothing to change."""
    rows: dict[str, list[Picture | None]] = {}
    inputs, outputs = subjects[0].inputs, subjects[0].outputs
    for number, subject in enumerate(subjects):
        for name in inputs:
            for label, edited, shown in _edits(subject, name):
                predictions = edited.predicted(shown)
                given = [edited.covered(other, shown) for other in inputs]
                rows[f"{number}: {label}"] = [*given, *(edited.painted(other, predictions[other]) for other in outputs)]
    columns = [*(f"{name}: given" for name in inputs), *(f"{name}: predicted" for name in outputs)]
    caption = "One patch is changed, in color or in class: what becomes of the predictions elsewhere? What is gray was masked."
    return Gallery(list(rows), columns, list(rows.values()), caption) if rows else None


def _triples(subject: Subject, names: Sequence[str], shown: Shown) -> list[Picture | None]:
    """Of each modality what was given, what is predicted and what it is."""
    predictions = subject.predicted(shown)
    cells: list[Picture | None] = []
    for name in names:
        cells.append(subject.covered(name, shown) if name in subject.inputs else None)
        cells.append(subject.painted(name, predictions[name]) if name in predictions else None)
        cells.append(subject.target(name))
    return cells


# ---- edits ----------------------------------------------------------------------------------------------------------

Edits = list[tuple[str, Subject, Shown]]
"""A row's title, an example with or without a patch changed, and which patches are visible."""


def _edits(subject: Subject, name: str) -> Edits:
    """An example as it is, and with one patch of a modality changed; none, where nothing can be changed."""
    modality, values = subject.modalities[name], subject.values[name]
    if modality.kind == "image" and values.shape[1] == 3:
        return _color_edits(subject, name)
    return _class_edits(subject, name) if modality.kind == "classes" else []


def _color_edits(subject: Subject, name: str) -> Edits:
    """The patch of the strangest color, beside all of a modality that has none."""
    values = subject.values[name]
    strangeness = (values - values.flatten(2).median(2).values[..., None, None]).square().sum(1)
    patch = _patch_of(subject, name, strangeness.nan_to_num(0.0))
    beside = [other for other in subject.inputs if subject.modalities[other].kind != "image"]
    inside = subject.pixels(name, patch)[:, None]
    changed = {f"{name} in {tint}": torch.where(inside, _tinted(values, color), values) for tint, color in TINTS.items()}
    return _rows(subject, name, changed, {**subject.whole(*beside[:1]), name: patch})


def _class_edits(subject: Subject, name: str) -> Edits:
    """The patch that is most of all of other classes than the picture's commonest, beside a few patches of a picture."""
    ids, classes = subject.values[name], subject.modalities[name].channels
    there = ids[ids != IGNORED]
    others = (ids != IGNORED) & (ids != (there.mode().values if len(there) else IGNORED))
    if not others.any():
        return []
    patch = _patch_of(subject, name, others.float())
    common, old = int(there.mode().values), int(ids[others & subject.pixels(name, patch)].mode().values)
    new = [common, next(number % classes for number in range(old + 1, old + classes) if number % classes != common or classes < 3)]
    inside = subject.pixels(name, patch) & (ids == old)
    changed = {f"{name} {old} to {number}": torch.where(inside, number, ids) for number in new}
    few = torch.randperm(subject.patches, generator=generator(0, "pictures", "beside"))[: max(subject.patches // 4, 1)]
    beside = [other for other in subject.inputs if subject.modalities[other].kind == "image"]
    shown = {other: _only(subject, few) for other in beside[:1]}
    return _rows(subject, name, changed, {**shown, name: patch})


def _rows(subject: Subject, name: str, changed: Mapping[str, Tensor], shown: Shown) -> Edits:
    variants = {f"{name} as it is": subject.values[name], **changed}
    return [(label, replace(subject, values={**subject.values, name: values}), shown) for label, values in variants.items()]


def _patch_of(subject: Subject, name: str, interest: Float[Tensor, "1 h w"]) -> Bool[Tensor, "n"]:
    """The patch that is of most interest."""
    by_patch = F.avg_pool2d(interest[None], subject.modalities[name].cell(subject.model.patch)).flatten()
    return _only(subject, by_patch.argmax()[None].cpu())


def _only(subject: Subject, patches: Int[Tensor, "k"]) -> Bool[Tensor, "n"]:
    return torch.zeros(subject.patches, dtype=torch.bool).index_fill(0, patches, True)


def _tinted(images: Float[Tensor, "1 3 h w"], color: tuple[float, float, float]) -> Float[Tensor, "1 3 h w"]:
    """Normalized pictures in shades of one color, as bright as before."""
    normalization = image_normalization(3)
    brightness = normalization.undone(images).amax(1, keepdim=True)
    return normalization(brightness * torch.tensor(color).to(images)[:, None, None])


# ---- colors ---------------------------------------------------------------------------------------------------------


def _heat(values: Float[Tensor, "h w"], target: Float[Tensor, "h w"]) -> Float[Tensor, "3 h w"]:
    """Values in the colors of viridis, over the target's range."""
    from matplotlib import colormaps

    there = target[~target.isnan()]
    low, high = (there.min(), there.max()) if len(there) else (torch.tensor(0.0), torch.tensor(1.0))
    share = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).nan_to_num(0.0)
    return torch.from_numpy(colormaps["viridis"](share.numpy())[..., :3]).permute(2, 0, 1)


def _three(colors: Float[Tensor, "c h w"]) -> Float[Tensor, "3 h w"]:
    return colors if len(colors) == 3 else colors.mean(0, keepdim=True).expand(3, -1, -1)


def _bytes(colors: Float[Tensor, "3 h w"], there: Bool[Tensor, "h w"]) -> Picture:
    values = torch.where(there, (255 * colors.clamp(0, 1)).round().nan_to_num(0.0), float(NOTHING))
    return values.permute(1, 2, 0).to(torch.uint8).numpy()


def _enlarged(picture: Tensor | np.ndarray, stride: int) -> np.ndarray:
    return np.asarray(picture).repeat(stride, 0).repeat(stride, 1)
