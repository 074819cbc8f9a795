"""Teachers: networks that are not trained any more, and that others learn from."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedvision import checkpoints
from fedvision.backbones import backbone, check_known
from fedvision.errors import ExperimentError
from fedvision.seeds import generator


def published(model: str, classes: int, channels: int, side: int | None = None, checkpoint: str | Path | None = None) -> nn.Module:
    """A timm model with published weights: those of a file, or those that timm downloads.

    Args:
        model: its name; with a tag, such as ``"tresnet_v2_l.miil_in21k_ft_in1k"``, where timm has several weights.
        classes: that it must tell apart.
        channels: of its images.
        side: of its images in pixels; None: those that it is made for.
        checkpoint: a file that ``checkpoints.read`` reads, in timm's names or in those of the architecture's authors, such as
            ``tresnet_l_v2_83_9.pth``, the teacher of the paper; None: download.

    Raises:
        ExperimentError: an unknown model, weights for other classes, a file that does not fit, or no network.
    """
    check_known(model)
    if checkpoint is None:
        return _downloaded(model, classes, channels, side)
    network = backbone(model, classes, channels, side, generator(0, "teacher"))
    checkpoints.load(network, converted(checkpoints.read(checkpoint), network), f"{checkpoint}, as {model!r} of {classes} classes,")
    return network


def converted(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A published checkpoint in the names that timm's model has now, by timm's own rules for that architecture.

    For TResNet these are the names of USI's reference code, whose normalization scales by |weight| + 1e-5.
    A checkpoint in timm's names stays as it is, and so does that of an architecture without rules.
    """
    rules = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return dict(state if rules is None else rules(dict(state), model))


def _downloaded(model: str, classes: int, channels: int, side: int | None) -> nn.Module:
    import timm

    config: Any = timm.get_pretrained_cfg(model)
    if config.num_classes != classes:
        trained = f"the weights of {model!r} are for {config.num_classes} classes, the data has {classes}"
        raise ExperimentError(f"{trained}; give a checkpoint of a teacher for this data")
    try:
        return backbone(model, classes, channels, side, generator(0, "teacher"), pretrained=True)
    except Exception as error:  # of the network, of its proxy, of the hub, ...
        reason = str(error).strip().split("\n")[0]
        raise ExperimentError(f"the weights of {model!r} cannot be downloaded ({reason}); give them as a checkpoint file") from error
