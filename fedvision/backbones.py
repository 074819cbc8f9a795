"""Networks of timm by name, for images of any size and number of classes."""

import math
from typing import Any

import torch
from torch import nn

from fedvision.errors import ExperimentError
from fedvision.seeds import global_generators
from fedvision.settings import nearest


def backbone(name: str, classes: int, channels: int, side: int | None, rng: torch.Generator, **options: Any) -> nn.Module:
    """A timm classifier with fresh weights.

    Args:
        name: timm's, such as ``"resnet50"``.
        classes: number of logits.
        channels: of its images.
        side: of its images in pixels, for networks that must know it, such as vision transformers; None: their own.
        rng: draws the weights.
        options: of timm, such as ``drop_path_rate``; those that are None are left out.

    Raises:
        ExperimentError: an unknown name, or options or images that the network cannot take.
    """
    import timm

    check_known(name)
    sized: dict[str, Any] = {"img_size": side} if side and _config(name).fixed_input_size and side != resolution(name) else {}
    try:
        with global_generators(rng):
            return timm.create_model(name, num_classes=classes, in_chans=channels, **sized, **options)  # type: ignore[no-any-return]
    except (AssertionError, TypeError, ValueError) as error:
        asked = ", ".join(f"{key} = {value}" for key, value in {**sized, **options}.items() if value is not None)
        raise ExperimentError(f"timm cannot build {name!r} with {asked or 'its own settings'} ({error}); choose others") from error


GROUPS = 32
"""Of channels in a GroupNorm at most, as Wu and He (arXiv 1803.08494) have it."""


def group_normalized(model: nn.Module) -> nn.Module:
    """The model with GroupNorm in place of each BatchNorm, so that no example depends on others or is remembered; names and weights stay.

    At most 32 groups, of at least two channels each, so that a map of one pixel is not normalized away.
    """
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                setattr(module, name, _group_norm(norm))
    return model


def _group_norm(norm: Any) -> nn.Module:
    from timm.layers.norm_act import GroupNormAct

    channels = norm.num_features
    groups = math.gcd(GROUPS, channels // 2, channels)
    grouped = nn.GroupNorm(groups, channels, norm.eps, norm.affine)
    if hasattr(norm, "act"):  # timm's, which applies an activation, too
        grouped = GroupNormAct(channels, groups, norm.eps, norm.affine)
        grouped.drop, grouped.act = norm.drop, norm.act
    grouped.load_state_dict(dict(norm.named_parameters()))
    return grouped.train(norm.training)


def check_known(name: str) -> None:
    """Refuse a name that timm does not know.

    Raises:
        ExperimentError: with the nearest names.
    """
    import timm

    if not timm.is_model(name):
        raise ExperimentError(f"unknown timm model {name!r}; {nearest(name, timm.list_models())[:200]} ...")


def resolution(name: str) -> int:
    """The side in pixels of the square images that a timm model is made for.

    >>> resolution("resnet50"), resolution("tresnet_v2_l")
    (224, 224)
    """
    return int(_config(name).input_size[-1])


def interpolation(name: str) -> str:
    """How images are resized for a timm model.

    >>> interpolation("tresnet_v2_l"), interpolation("vit_small_patch16_224")
    ('bilinear', 'bicubic')
    """
    return str(_config(name).interpolation)


def _config(name: str) -> Any:
    import timm

    return timm.get_pretrained_cfg(name)
