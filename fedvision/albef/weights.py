"""Published weights: ALBEF's own files, and those of vision transformers and of BERT that it begins with, fitted to a network.

In ALBEF's files a state dict has ``visual_encoder.*`` (as timm calls a vision transformer's arrays), ``text_encoder.bert.*`` and
``text_encoder.cls.*`` (as BERT's are called) or, after fine-tuning, ``text_encoder.*``, heads, slowly moving copies that are called
as the parts they follow with ``_m`` behind, and queues. It is that of our networks, so writing it needs nothing.

Source: the names and shapes of the checkpoints that belong to arXiv 2107.07651, and of timm's and Hugging Face's.
"""

import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor, nn

from fedvision import checkpoints
from fedvision.albef.vision import resized_positions
from fedvision.checkpoints import Converted, Fit, Shape, check_finite, listed
from fedvision.errors import ExperimentError
from fedvision.multimae import weights as multimae

Layout = Literal["ALBEF", "vision transformer", "BERT"]
State = dict[str, Tensor]

VISION, TEXT, DECODER, COPY = "visual_encoder", "text_encoder", "text_decoder", "_m"

POSITIONS = (".pos_embed", ".position_embeddings.weight")
"""Of patches, and of words."""

PIECES = ("cls", "crossattention", "norm")
"""What a part may have or not have by itself: a head for words, layers' attention to pictures, the last normalization."""

MEMORY = ("image_queue", "text_queue", "queue_ptr")
"""What is remembered of earlier batches; it is taken as a whole or not at all."""

VISION_ONLY = ("head.", "head_dist.", "fc_norm.", "pre_logits.", "decoder_", "mask_token")
"""What vision transformers have and ALBEF's has not: classifiers with their normalization, MAE's decoder."""

BERT_ONLY = ("pooler.", "cls.seq_relationship.")
"""What BERT has and ALBEF has not: what says whether a sentence follows another."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What of a checkpoint a network began with.

    A part is what a name begins with, such as ``vision_proj``; heads for words, attention to pictures, and the last normalization of
    an encoder are named by themselves, as ``text_encoder.cls``.

    Attributes:
        where: the checkpoint.
        layout: that it was in.
        fit: names that the network has and the checkpoint, under the network's names, has not; and the other way round.
        found: parts that were found.
        new: parts that the checkpoint does not know, which begin as the network was built.
        left_out: parts of the checkpoint that the network has no place for.
        copied: slowly moving copies that the checkpoint does not know, which begin at the parts that they follow.
        resized: positions that were interpolated to another grid, or cut.
    """

    where: str
    layout: Layout
    fit: Fit
    found: tuple[str, ...]
    new: tuple[str, ...]
    left_out: tuple[str, ...]
    copied: tuple[str, ...]
    resized: tuple[str, ...]

    def __str__(self) -> str:
        parts = {
            "found": self.found,
            "begin anew": self.new,
            "left out": self.left_out,
            "begin as what they follow": self.copied,
            "other positions": self.resized,
        }
        return f"{self.where} ({self.layout}): {listed(parts)}"


# ---- files ----------------------------------------------------------------------------------------------------------


def initialized_from(model: nn.Module, path: str | Path) -> Report:
    """Give a network of ALBEF the weights of another, of pre-training or of any task.

    Of a network without an answer decoder that has one, it takes the layers that look at pictures, and the head for words. Where
    layers come in twos, as for pairs of pictures, both take the one that looks at pictures. Positions of patches are interpolated to
    another grid; queues of another length, and heads of other classes, begin anew. Copies that the file lacks begin at what they
    follow. All of it is in the report, and in the log.

    Args:
        model: overwritten, unless the file does not fit.
        path: a published checkpoint, a stripped one, what `fedvision export` wrote, or a run's ``model.safetensors``.

    Raises:
        ExperimentError: a file that cannot be read; encoders of another size, or another vocabulary; values that are not finite. The
            network is as it was.

    Differs: the public implementation begins copies before it loads the parts that they follow, if the file has none (NLVR2).
    """
    where, state = str(path), checkpoints.read(path)
    if not all(any(name.startswith(f"{part}.") for name in state) for part in (VISION, TEXT)):
        found = ", ".join(list(state)[:5])
        fact = f"{where} holds {found}, ..., not ALBEF's names (visual_encoder..., text_encoder...)"
        raise ExperimentError(f"{fact}; vision transformers are for learner.vision_checkpoint, and BERT for learner.text_checkpoint")
    own = model.state_dict(keep_vars=True)
    needed = _bodies((VISION, f"{VISION}.norm", TEXT, f"{TEXT}.crossattention", DECODER, f"{DECODER}.crossattention"), own)
    return _taken(model, renamed(state, own), where, "ALBEF", needed, {_part(name) for name in own})


def initialized_from_vision(model: nn.Module, path: str | Path) -> Report:
    """Give the image encoder, and its copy, the weights of a vision transformer.

    Args:
        model: a network of ALBEF; overwritten, unless the file does not fit.
        path: a file of timm, of DeiT, of MAE, or of MultiMAE; classifiers and decoders are left out.

    Raises:
        ExperimentError: see ``initialized_from``.
    """
    where, state = str(path), checkpoints.read(path)
    if multimae.layout_of(state, where) == "multimae":
        state = multimae.to_timm(state, where).state
    named = {f"{VISION}.{name}": tensor for name, tensor in state.items() if not name.startswith(VISION_ONLY)}
    return _taken(model, named, where, "vision transformer", {VISION}, {VISION, f"{VISION}.norm"})


def initialized_from_text(model: nn.Module, path: str | Path) -> Report:
    """Give the text networks, and their copies, the weights of BERT; attention to pictures stays as it was built.

    Where layers come in twos, both take the same. An answer decoder takes as many of the first layers as it has.

    Args:
        model: a network of ALBEF; overwritten, unless the file does not fit.
        path: a file of Hugging Face's BERT, with any heads or none; that for words is kept where the network has one.

    Raises:
        ExperimentError: see ``initialized_from``.
    """
    where, own = str(path), model.state_dict(keep_vars=True)
    state = {_bert_name(name): tensor for name, tensor in checkpoints.read(path).items()}
    if "embeddings.word_embeddings.weight" not in state:
        raise ExperimentError(f"{where} holds {', '.join(list(state)[:5])}, ..., not BERT's names (bert.embeddings...); give a BERT's file")
    named = {_within_albef(name): tensor for name, tensor in state.items() if not name.startswith(BERT_ONLY)}
    texts = {_part(name) for name in own if name.startswith((f"{TEXT}.", f"{DECODER}."))}
    return _taken(model, renamed(named, own, bert=True), where, "BERT", _bodies((TEXT, DECODER), own), texts)


def to_timm(state: Mapping[str, Tensor], where: str = "the model") -> Converted:
    """The image encoder of a network of ALBEF as a vision transformer of timm, without a classifier.

    Args:
        state: of the network.
        where: for messages.

    Raises:
        ExperimentError: it has no image encoder.
    """
    begin = f"{VISION}."
    converted = {name.removeprefix(begin): tensor for name, tensor in state.items() if name.startswith(begin)}
    if not converted:
        raise ExperimentError(f"{where} has no {VISION}, which timm's layout needs; choose the layout albef")
    return Converted(converted, tuple(name for name in state if not name.startswith(begin)))


def _bert_name(name: str) -> str:
    """A name of BERT's, without what heads put before it, and as newer files have it."""
    return name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _within_albef(name: str) -> str:
    return f"{TEXT}.{name}" if name.startswith("cls.") else f"{TEXT}.bert.{name}"


def _bodies(parts: Iterable[str], own: Iterable[str]) -> set[str]:
    """Those of the parts that a network has."""
    return set(parts) & {_part(name) for name in own}


# ---- names of text networks -----------------------------------------------------------------------------------------

LAYER = re.compile(r"(?:bert\.)?encoder\.layer\.(\d+)\.(.*)")


class Stack(NamedTuple):
    """The layers of a text network.

    Attributes:
        begin: of all names, but those of its head.
        layers: how many.
        fusion: the first that looks at pictures.
        paired: whether those come in twos that share keys and values.
    """

    begin: str
    layers: int
    fusion: int
    paired: bool

    @classmethod
    def of(cls, state: Mapping[str, Tensor], part: str) -> "Stack | None":
        """That of a part of a state dict, or None."""
        names = [name.removeprefix(f"{part}.") for name in state if name.startswith(f"{part}.")]
        numbered = [(int(found[1]), found[2]) for found in map(LAYER.match, names) if found]
        if not numbered:
            return None
        begin = f"{part}.bert." if any(name.startswith("bert.") for name in names) else f"{part}."
        layers = 1 + max(number for number, _ in numbered)
        fusion = min((number for number, rest in numbered if rest.startswith("crossattention.")), default=layers)
        keys = [state.get(f"{begin}encoder.layer.{number}.crossattention.self.key.weight") for number in (fusion, fusion + 1)]
        return cls(begin, layers, fusion, keys[0] is not None and keys[0] is keys[1])


def renamed(state: Mapping[str, Tensor], own: Mapping[str, Tensor], bert: bool = False) -> State:
    """Weights under the names that a network has for them; others stay as they are.

    Args:
        state: of a network of ALBEF.
        own: of the one that is to have them, ``state_dict(keep_vars=True)``, so that what is shared can be told.
        bert: whether the layers are BERT's, of which an answer decoder has the first.
    """
    changed: State = {}
    for copy in ("", COPY):
        text, decoder = f"{TEXT}{copy}", f"{DECODER}{copy}"
        theirs, ours = Stack.of(state, text), Stack.of(own, text)
        answers = None if any(name.startswith(f"{decoder}.") for name in state) else Stack.of(own, decoder)
        for name, tensor in state.items():
            if theirs is None or not name.startswith(f"{text}."):
                continue
            rest = name.removeprefix(f"{text}.").removeprefix("bert.")
            places = _in_encoder(rest, text, theirs, ours)
            if answers is not None:
                taken = range(answers.layers) if bert else range(theirs.fusion, theirs.layers)
                places += _in_decoder(rest, decoder, answers, taken)
            changed |= dict.fromkeys(places, tensor)
    texts = (f"{TEXT}.", f"{TEXT}{COPY}.")
    return {name: tensor for name, tensor in state.items() if not name.startswith(texts)} | changed


def _in_encoder(rest: str, part: str, theirs: Stack, ours: Stack | None) -> list[str]:
    """Where an array of a text network belongs in another one."""
    found = LAYER.match(rest)
    begin = f"{part}." if ours is None or rest.startswith("cls.") else ours.begin
    if found is None or ours is None:
        return [f"{begin}{rest}"]
    number, fusion = int(found[1]), ours.fusion
    doubled = ours.paired and ours.layers == fusion + 2 * (theirs.layers - fusion)
    numbers = (2 * number - fusion, 2 * number - fusion + 1) if doubled and number >= fusion else (number,)
    return [f"{begin}encoder.layer.{each}.{found[2]}" for each in numbers]


def _in_decoder(rest: str, part: str, decoder: Stack, taken: range) -> list[str]:
    """Where an array of a text network belongs in an answer decoder: of its layers those that are taken."""
    found = LAYER.match(rest)
    if found is None:
        return [f"{part}.{rest}" if rest.startswith("cls.") else f"{decoder.begin}{rest}"]
    number = int(found[1])
    return [f"{decoder.begin}encoder.layer.{number - taken.start}.{found[2]}"] if number in taken else []


# ---- fitting --------------------------------------------------------------------------------------------------------


def _taken(model: nn.Module, state: State, where: str, layout: Layout, needed: Collection[str], asked: Collection[str]) -> Report:
    """Give a network weights that have its names.

    Args:
        model: overwritten, unless they do not fit.
        state: the weights.
        where: they are from, for messages.
        layout: that they were in, for the report.
        needed: parts without which they are refused.
        asked: parts that are missing where they are not there.
    """
    own = model.state_dict(keep_vars=True)
    kept = {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}
    odd = _not_taken(kept, own)
    given = {name: tensor for name, tensor in kept.items() if name not in odd}
    fitted = {name: _on_grid(name, tensor, own, where) for name, tensor in given.items()}
    fit = _fit(fitted, own, asked)
    _check_fits(fit, fitted, own, needed, where)
    check_finite(fitted, where)
    model.load_state_dict(fitted, strict=False)
    _begin_copies(model, fit.missing)
    moved = tuple(name for name in given if given[name].shape != fitted[name].shape)
    unused = (*fit.unexpected, *(name for name in kept if name not in given))
    return _told(where, layout, Fit(fit.missing, unused, {}), [name for name in fitted if name in own], moved)


def _not_taken(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> set[str]:
    """Queues if one of them is missing or of another length, and heads of other classes."""
    odd = {name for name in state if name in own and state[name].shape != own[name].shape}
    without = {"cls_head", f"cls_head{COPY}"} if any(name.startswith("cls_head") for name in odd) else set()
    if odd & {*MEMORY, "idx_queue"} or not state.keys() >= set(MEMORY):
        without |= {*MEMORY, "idx_queue"}
    return {name for name in state if name.split(".")[0] in without}


def _on_grid(name: str, tensor: Tensor, own: Mapping[str, Tensor], where: str) -> Tensor:
    """Positions of patches on the grid of the network's, of words as many as it has; all else as it is."""
    if name not in own or not name.endswith(POSITIONS) or tensor.shape == own[name].shape or tensor.ndim != own[name].ndim:
        return tensor
    if name.endswith(POSITIONS[1]):
        return tensor[: len(own[name])]
    try:
        return resized_positions(tensor.float(), math.isqrt(own[name].shape[1] - 1))
    except ExperimentError as error:
        raise ExperimentError(f"{where}: {error}") from error


def _fit(state: Mapping[str, Tensor], own: Mapping[str, Tensor], asked: Collection[str]) -> Fit:
    """As ``Fit.of``, but nothing is missing that is there under another name, or of a part that is not asked for."""
    there = {id(own[name]) for name in state if name in own}
    wanted = (name for name in own if _followed(_part(name)) in asked and not name.endswith("position_ids"))
    shapes = {name: (tuple(state[name].shape), tuple(own[name].shape)) for name in own if name in state}
    return Fit(
        tuple(name for name in wanted if id(own[name]) not in there),
        tuple(name for name in state if name not in own),
        {name: pair for name, pair in shapes.items() if pair[0] != pair[1]},
    )


def _check_fits(fit: Fit, state: Iterable[str], own: Iterable[str], needed: Collection[str], where: str) -> None:
    """Refuse a part that is needed and not there, or that both have and that differs.

    Raises:
        ExperimentError: with file, name, shapes and remedy.
    """
    ours = {_part(name) for name in own}
    wanted = {*needed, *(_part(name) for name in state)}
    missing = tuple(name for name in fit.missing if _part(name) in wanted)
    further = tuple(name for name in fit.unexpected if _part(name) in ours)
    Fit(missing, further, fit.misshapen).check(where, _remedy, "as deep, and with as many layers that look at pictures")


def _begin_copies(model: nn.Module, missing: Iterable[str]) -> None:
    """Put copies where the parts are that they follow."""
    loaded = model.state_dict()
    for name in missing:
        if _followed(name) != name:
            loaded[name].copy_(loaded[_followed(name)])


def _remedy(name: str, theirs: Shape, ours: Shape) -> str:
    """What to change so that an array has the shape that it has in the checkpoint."""
    words = ".word_embeddings." in name or ".cls.predictions." in name
    if words and theirs[:1] != ours[:1]:
        return f"choose the vocabulary that it was made with, of {theirs[0]} tokens"
    if ".patch_embed." in name and theirs[:1] == ours[:1]:
        return "choose the patch and the channels that it has there"
    if name.endswith(POSITIONS[1]) and theirs[1:] == ours[1:]:
        return f"choose texts of {theirs[0]} tokens at most"
    if name.startswith(("vision_proj", "text_proj")) and theirs[1:] == ours[1:]:
        return f"choose {theirs[0]} features"
    return "choose the widths that it has there"


def _told(where: str, layout: Layout, fit: Fit, found: Iterable[str], resized: tuple[str, ...]) -> Report:
    missing = dict.fromkeys(_part(name) for name in fit.missing)
    copied = dict.fromkeys(part.split(".")[0] for part in missing if _followed(part) != part)
    new = tuple(part for part in missing if _followed(part) == part)
    there, unused = (tuple(dict.fromkeys(map(_part, names))) for names in (found, fit.unexpected))
    report = Report(where, layout, fit, there, new, unused, tuple(copied), resized)
    log.info("%s", report)
    return report


def _part(name: str) -> str:
    """The part that an array belongs to, see ``Report``."""
    first, *rest = name.split(".")
    return next((f"{first}.{piece}" for piece in PIECES if piece in rest), first)


def _followed(name: str) -> str:
    """The name of what an array, or a part, is a copy of; itself if it is none."""
    first, dot, rest = name.partition(".")
    return f"{first.removesuffix(COPY)}{dot}{rest}"
