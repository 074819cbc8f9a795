"""Local steps of the papers' learners against plain PyTorch and timm loops that do the same: ``python -m benchmarks.speed.learners``.

Both take turns within every repeat on the same images, networks and threads, so that the ratios hold on another machine, or
beside other work, where the seconds do not. The first repeat warms up and is not counted. The plain loops use this project's
networks, views and teacher, and have their own batches, losses, optimizer and moving averages; that of ALBEF has its own text network.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.data.mixup import Mixup
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.nn import functional as F

from benchmarks.speed.aggregation import seconds
from benchmarks.speed.plain_albef import plain_albef
from fedvision import ctaugment
from fedvision.assembly import laid_out
from fedvision.data import Examples, Spec
from fedvision.data.texts import encode_texts
from fedvision.experiment import Experiment
from fedvision.holdings import Holdings
from fedvision.learners.albef import ALBEF
from fedvision.learners.doublematch import DoubleMatch
from fedvision.learners.learner import Learner
from fedvision.learners.multimae import MultiMAE
from fedvision.learners.usi import USI
from fedvision.multimae.views import image_normalization
from fedvision.seeds import generator, global_generators
from fedvision.silo import Silo
from fedvision.views import weak

Loop = Callable[[int], None]
"""So many steps of training."""


@dataclass(frozen=True)
class Preset:
    """What is measured.

    Attributes:
        experiment: a bundled one.
        spec: of the random images that stand for its data.
        batch: images a step, of those without labels.
        changes: of the experiment's settings.
    """

    experiment: str
    spec: Spec
    batch: int
    changes: Mapping[str, Any]


SCENES = {"name": "scenes", "size": 32, "classes": 10, "examples": 64, "test_examples": 1}

CAPTION = ("a", "small", "red", "circle", "and", "a", "large", "blue", "square", "at", "the", "top", "left", "of", "a", "white", "wall")
"""Words of which captions are made: every other one from one of the first three on."""

PRESETS = {
    "DoubleMatch, tiny": Preset("doublematch-tiny", Spec((1, 8, 8), 10), 80, {}),
    "DoubleMatch, WRN-28-2 at 32 pixels, 8 + 56 images": Preset(
        "doublematch-cifar10", Spec((3, 32, 32), 10), 56, {"learner.labeled_batch": 8}
    ),
    "USI, tiny": Preset("usi-tiny", Spec((3, 16, 16), 5), 32, {"learner.teacher.steps": 1, "learner.teacher.data.examples": 64}),
    "USI, ResNet-18 at 32 pixels, 32 images": Preset(
        "usi-tiny",
        Spec((3, 32, 32), 10),
        32,
        {"learner.model": "resnet18", "learner.teacher": {"model": "resnet26", "steps": 1, "data": SCENES}},
    ),
    "MultiMAE, tiny": Preset("multimae-tiny", Spec((3, 32, 32), 4, ("image", "depth", "semseg")), 32, {}),
    "MultiMAE, ViT-B at 224 pixels, 2 pictures": Preset(
        "multimae-imagenet", Spec((3, 224, 224), 0, ("image", "depth", "semseg")), 2, {"learner.crop_scale": [1.0, 1.0]}
    ),
    "ALBEF, tiny": Preset("albef-tiny", Spec((3, 32, 32), 4, ("image", "caption")), 48, {}),
    "ALBEF, narrow at 128 pixels, 256 patches, 8 pictures": Preset("albef-tiny", Spec((3, 128, 128), 4, ("image", "caption")), 8, {}),
}


def ours(learner: Learner, model: nn.Module, examples: Examples, preset: Preset, optimizer: dict[str, Any]) -> Loop:
    """A client's steps."""
    holdings = Holdings.of(learner, model)

    def train(steps: int) -> None:
        rng = generator(0, "ours")
        with global_generators(rng):
            silo = Silo(learner, model, holdings.shared, examples, None, rng, 0.0, 1.0, holdings)
            silo.descend(silo.batches(preset.batch, steps=steps), optimizer)

    return train


def plain_doublematch(learner: DoubleMatch, model: Any, examples: Examples, preset: Preset, optimizer: dict[str, Any]) -> Loop:
    """The same by hand."""
    network, average, rates = model.network, model.average, model.rates
    kernels = [param for param in network.parameters() if param.ndim > 1]
    others = [param for param in network.parameters() if param.ndim < 2]
    groups = [{"params": kernels, "weight_decay": optimizer["weight_decay"]}, {"params": others, "weight_decay": 0.0}]

    def train(steps: int) -> None:
        rng = generator(0, "plain")
        model.train()
        sgd = torch.optim.SGD(groups, lr=optimizer["lr"], momentum=0.9, nesterov=True)
        for _ in range(steps):
            chosen = torch.randperm(len(examples), generator=rng)[: learner.labeled_batch]
            labels = examples.label[chosen]
            images = 2 * examples.image[torch.randperm(len(examples), generator=rng)[: preset.batch]] - 1
            view = weak(2 * examples.image[chosen] - 1, rng, learner.flip)
            probes = ctaugment.probe_policies(len(view), rng)
            probe = ctaugment.applied(view, probes)
            w, s = weak(images, rng, learner.flip), weak(images, rng, learner.flip)
            s = ctaugment.applied(s, ctaugment.strong_policies(rates, len(s), rng))
            features = network.backbone.features(torch.cat([view, w, s]))
            logits = network.backbone.classifier(features)
            y, u, v = logits.split([len(view), len(w), len(s)])
            z = features[len(view) : len(view) + len(w)].detach()
            sure, pseudo = u.detach().softmax(1).max(1)
            loss = F.cross_entropy(y, labels)
            loss = loss + (F.cross_entropy(v, pseudo, reduction="none") * (sure >= learner.threshold)).mean()
            loss = loss + learner.similarity_weight * (1 - F.cosine_similarity(network.projection(features[-len(s) :]), z)).mean()
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - learner.ema_decay)
                for own, theirs in zip(average.buffers(), network.buffers(), strict=True):
                    own.copy_(theirs)
                near = ctaugment.proximity(average(probe).logits.softmax(1), labels)
                rates.copy_(ctaugment.updated(rates, probes.operations, probes.levels, near))

    return train


def plain_usi(learner: USI, model: Any, examples: Examples, preset: Preset, optimizer: dict[str, Any]) -> Loop:
    """The same by hand, with timm's parts."""
    network, teacher = model.network, model.teacher
    mixup, criterion = Mixup(learner.mixup, learner.cutmix, label_smoothing=0.0, num_classes=model.classes), SoftTargetCrossEntropy()
    decayed = [param for param in network.parameters() if param.ndim > 1]
    others = [param for param in network.parameters() if param.ndim < 2]
    groups = [{"params": decayed, "weight_decay": optimizer["weight_decay"]}, {"params": others, "weight_decay": 0.0}]

    def train(steps: int) -> None:
        rng = generator(0, "plain")
        ema, adamw = ModelEmaV3(network, decay=learner.ema_decay), torch.optim.AdamW(groups, lr=optimizer["lr"])
        network.train()
        for _ in range(steps):
            index = torch.randperm(len(examples), generator=rng)[: preset.batch]
            images, targets = mixup(model.own(examples.image[index]), examples.label[index])
            logits = network(images)
            with torch.no_grad():
                advice = teacher(model.teachers(model.own.undone(images)))
            divergence = F.kl_div(logits.log_softmax(1), advice.log_softmax(1), reduction="batchmean", log_target=True)
            loss = criterion(logits, targets) + learner.alpha * divergence
            adamw.zero_grad()
            loss.backward()
            adamw.step()
            ema.update(network)

    return train


def plain_multimae(learner: MultiMAE, model: Any, examples: Examples, preset: Preset, optimizer: dict[str, Any]) -> Loop:
    """The same by hand."""
    patch, stride, normalized = learner.patch, learner.semantic_stride, image_normalization(3)
    trained = [param for param in model.parameters() if param.requires_grad]

    def share_out(n: int, patches: int, visible: int, rng: torch.Generator) -> torch.Tensor:
        counts = (torch._sample_dirichlet(torch.full((n, 3), learner.alpha), rng) * visible).round()
        wished = torch.cat([torch.rand(n, patches, generator=rng).argsort(1) < count[:, None] for count in counts.unbind(1)], 1)
        return (torch.rand(n, 3 * patches, generator=rng) - wished.float()).argsort(1)[:, :visible]

    def train(steps: int) -> None:
        rng = generator(0, "plain")
        model.train()
        adamw = torch.optim.AdamW(trained, lr=optimizer["lr"], betas=(0.9, 0.95), weight_decay=optimizer["weight_decay"])
        for _ in range(steps):
            index = torch.randperm(len(examples), generator=rng)[: preset.batch]
            rgb, depth = normalized(examples.image[index]), examples.fields["depth"][index]
            semseg = examples.fields["semseg"][index][:, ::stride, ::stride].long()
            if learner.flip:
                flips = torch.rand(len(index), generator=rng) < learner.flip
                rgb[flips], depth[flips], semseg[flips] = rgb[flips].flip(-1), depth[flips].flip(-1), semseg[flips].flip(-1)
            middle = depth.flatten(1).sort(1).values
            middle = middle[:, int(0.1 * middle.shape[1]) : int(0.9 * middle.shape[1])]
            depth = (depth - middle.mean(1)[:, None, None, None]) / (middle.var(1)[:, None, None, None] + 1e-6).sqrt()
            rows = rgb.shape[-1] // patch
            n = rows * rows
            keep = share_out(len(index), n, learner.visible or n // 2, rng)
            found = model({"rgb": rgb, "depth": depth, "semseg": semseg}, keep)
            masked = torch.ones(len(index), 3 * n).scatter(1, keep, 0.0)
            blocks = rgb.unflatten(3, (rows, patch)).unflatten(2, (rows, patch))
            variance, mean = torch.var_mean(blocks, dim=(1, 3, 5), keepdim=True)
            errors = {
                "rgb": (found["rgb"] - rgb).square().mean(1),
                "depth": (found["depth"] - depth).abs().mean(1),
                "semseg": F.cross_entropy(found["semseg"], semseg, reduction="none"),
                "norm_rgb": (found["norm_rgb"] - ((blocks - mean) / (variance + 1e-6).sqrt()).view_as(rgb)).square().mean(1),
            }
            loss = torch.zeros(())
            for name, error in errors.items():
                first = ("rgb", "depth", "semseg").index(name.removeprefix("norm_")) * n
                side = error.shape[-1] // rows
                mask = masked[:, first : first + n].view(-1, rows, rows).repeat_interleave(side, 1).repeat_interleave(side, 2)
                loss = loss + ((error * mask).sum((1, 2)) / mask.sum((1, 2))).nanmean()
            adamw.zero_grad()
            loss.backward()
            adamw.step()

    return train


PLAIN: dict[type[Learner], Callable[..., Loop]] = {
    DoubleMatch: plain_doublematch,
    USI: plain_usi,
    MultiMAE: plain_multimae,
    ALBEF: plain_albef,
}


def drawn(spec: Spec) -> Examples:
    """Random examples, as many as a batch needs or 512 small ones."""
    rng, number = generator(0, "images"), 512 if max(spec.image_shape) < 100 else 8
    fields = {"image": torch.rand(number, *spec.image_shape, generator=rng)}
    side = spec.image_shape[1:]
    if "depth" in spec.fields:
        fields |= {"depth": 1 + torch.rand(number, 1, *side, generator=rng)}
        fields |= {"semseg": torch.randint(5, (number, *side), generator=rng).to(torch.uint8)}
    if "caption" in spec.fields:
        fields |= {"caption": encode_texts([[" ".join(CAPTION[i % 3 :: 2])] for i in range(number)])}
    return Examples(fields | {"label": torch.randint(max(spec.classes, 2), (number,), generator=rng)})


def ratios(preset: Preset, steps: int, repeats: int) -> list[float]:
    """Our time over the plain loop's, in each repeat."""
    experiment = Experiment.load(preset.experiment, preset.changes)
    learner: Any = experiment.build_learner()
    optimizer = dict(experiment.strategy.settings["client_optimizer"])
    examples = drawn(preset.spec)
    models = [laid_out(learner.build(preset.spec, generator(0, "model"))) for _ in range(2)]
    plain = PLAIN[type(learner)]
    loops = [ours(learner, models[0], examples, preset, optimizer), plain(learner, models[1], examples, preset, optimizer)]
    measured = [[seconds(partial(loop, steps)) for loop in loops] for _ in range(repeats + 1)]
    return [one / other for one, other in measured[1:]]


def options(document: str | None, steps: int) -> argparse.Namespace:
    """The command line of a comparison of local steps, whose threads are set.

    Args:
        document: of the module; its first line describes it.
        steps: in a repeat, if not asked for otherwise.
    """
    parser = argparse.ArgumentParser(description=(document or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=steps, help="of training in a repeat")
    parser.add_argument("--repeats", type=int, default=5, help="beside one that warms up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="of the lines, those that begin so")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def main() -> None:
    """Print a line for each preset."""
    arguments = options(__doc__, steps=10)
    print(f"time of our local steps / plain loop, median [least, most] of {arguments.repeats} repeats, {arguments.threads} thread(s)")
    chosen = {name: preset for name, preset in PRESETS.items() if name.startswith(arguments.only)}
    for name, preset in chosen.items():
        found = ratios(preset, arguments.steps, arguments.repeats)
        print(f"{name:<54}{statistics.median(found):>6.2f} [{min(found):.2f}, {max(found):.2f}]", flush=True)


if __name__ == "__main__":
    main()
