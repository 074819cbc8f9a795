"""Pseudo labels: depth and semantic maps that others' networks predict for pictures that have none.

A folder then is what the data set ``paired-folders`` reads: ``rgb/``, ``depth/``, ``semseg/``, with files of the same names.

Source: arXiv 2204.01678, section 3.5: pre-training on maps that published networks predict.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from fedvision.data.examples import IGNORED
from fedvision.data.pictures import ENDINGS, existing, pictures_below
from fedvision.errors import DataError, ExperimentError

Task = Literal["depth-estimation", "image-segmentation"]

Progress = Callable[[str, int], None]

SIDECAR = "labels.json"
"""The file that tells where the maps of a folder come from."""

MOST = 2**16 - 1
"""The largest number in a depth map; 0 is for pixels where nothing was measured, and the smallest here is 1."""


@dataclass(frozen=True)
class Depth:
    """How depth maps are made.

    Attributes:
        model: a folder of ``save_pretrained``, or a name on Hugging Face's hub.
        inverse: whether the network predicts more where things are nearer, as most do.
        scale: of a network that predicts meters: what one meter is in the files, ``data.depth_scale`` of ``paired-folders``. Without
            one every map is stretched from 1 to 65535, since it has no unit.

    Raises:
        ExperimentError: ``inverse`` and ``scale`` together.
    """

    model: str
    inverse: bool = False
    scale: float | None = None

    folder: ClassVar[str] = "depth"
    task: ClassVar[Task] = "depth-estimation"

    def __post_init__(self) -> None:
        if self.inverse and self.scale is not None:
            raise ExperimentError("inverse depth has no meters, so there is no --scale for it; leave out one of both")
        if self.scale is not None and self.scale <= 0:
            raise ExperimentError(f"--scale = {self.scale}: expected a number above 0, such as 1000 for millimeters")


@dataclass(frozen=True)
class Semseg:
    """How semantic maps are made.

    Attributes:
        model: a folder of ``save_pretrained``, or a name on Hugging Face's hub.
    """

    model: str

    folder: ClassVar[str] = "semseg"
    task: ClassVar[Task] = "image-segmentation"


def label(
    root: str | Path,
    wanted: Sequence[Depth | Semseg],
    device: str = "cpu",
    batch: int = 8,
    on_progress: Progress = lambda kind, maps: None,
) -> dict[str, int]:
    """Make the maps of all pictures that have none yet.

    Each map is written in one step, so an interrupted call leaves whole maps only, and the same call goes on.

    Args:
        root: it holds ``rgb``, or ``train/rgb`` and ``test/rgb``.
        wanted: which maps, by which network.
        device: where to compute.
        batch: pictures at a time.
        on_progress: called with the kind of map, and how many there are.

    Returns:
        How many maps of each kind were made.

    Raises:
        DataError: no pictures, one that cannot be read, two of one name, maps of another network.
        ExperimentError: no ``transformers``, a network that is not there or does something else, more than 255 classes.
    """
    parts = _parts(Path(root))
    made = {}
    for kind in wanted:
        pairs = [pair for part in parts for pair in _pairs(part, kind.folder)]
        _check_same(Path(root), kind, any(target.exists() for _, target in pairs))
        made[kind.folder] = _made(Path(root), kind, pairs, device, batch, on_progress)
    return made


def count(root: str | Path) -> int:
    """How many pictures a folder holds.

    Raises:
        DataError: none.
    """
    return sum(len(_pairs(part, "depth")) for part in _parts(Path(root)))


def _made(root: Path, kind: Depth | Semseg, pairs: Sequence[tuple[Path, Path]], device: str, batch: int, on_progress: Progress) -> int:
    missing = [(source, target) for source, target in pairs if not target.exists()]
    done = len(pairs) - len(missing)
    on_progress(kind.folder, done)
    if not missing:
        return 0
    network = Network.load(kind.model, kind.task, device)
    _tell(root, kind, network.classes if isinstance(kind, Semseg) else None)
    for pictures in _batches(missing, batch):
        for (target, _), map_ in zip(pictures, network([picture for _, picture in pictures]), strict=True):
            numbers = as_bytes(map_) if isinstance(kind, Semseg) else as_numbers(map_, kind.inverse, kind.scale)
            _in_one_step(target, partial(Image.fromarray(numbers).save, format="PNG"))
        done += len(pictures)
        on_progress(kind.folder, done)
    return len(missing)


# ---- networks -------------------------------------------------------------------------------------------------------


class Network:
    """A network of ``transformers`` that makes one map a picture.

    Args:
        pipeline: of ``transformers``, for one of the tasks.
        task: which.
    """

    def __init__(self, pipeline: Any, task: Task) -> None:
        self.pipeline, self.task = pipeline, task

    @classmethod
    def load(cls, model: str, task: Task, device: str = "cpu") -> "Network":
        """The network that a folder holds, or the hub.

        Raises:
            ExperimentError: no ``transformers``, no such network, one for another task, or no such device.
        """
        transformers = required()
        try:
            network = cls(transformers.pipeline(task, model=model, device=torch.device(device)), task)
            network([Image.new("RGB", (64, 64))])  # what does something else fails here, and not after the first thousand pictures
        except Exception as error:  # of any kind: files, the hub, the network, the device
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            fact = f"{model!r} cannot be used for {task} ({reason})"
            raise ExperimentError(f"{fact}; give a folder written by save_pretrained, or the name of such a network on the hub") from error
        if task == "image-segmentation" and len(network.classes) > IGNORED:
            fact = f"{model!r} tells {len(network.classes)} classes apart, and maps of bytes hold at most {IGNORED}"
            raise ExperimentError(f"{fact}; choose a network of fewer classes")
        return network

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by number."""
        names = self.pipeline.model.config.id2label
        return [names[number] for number in sorted(names)]

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """The map of each picture [height, width], of its size: depth as it was predicted, float, or numbers of classes, int."""
        prepared = [self.pipeline.image_processor(images=picture, return_tensors="pt")["pixel_values"] for picture in pictures]
        maps: list[Tensor] = []
        for _, together in groupby(zip(prepared, pictures, strict=True), lambda pair: pair[0].shape):
            values, originals = zip(*together, strict=True)
            maps += self._mapped(torch.cat(values), [(picture.height, picture.width) for picture in originals])
        return maps

    def _mapped(self, values: Float[Tensor, "n c h w"], sizes: list[tuple[int, int]]) -> list[Tensor]:
        model, processor = self.pipeline.model, self.pipeline.image_processor
        outputs: Any = model(pixel_values=values.to(model.device, model.dtype))
        if self.task == "depth-estimation":
            return [each["predicted_depth"].float().cpu() for each in processor.post_process_depth_estimation(outputs, sizes)]
        return [each.cpu() for each in processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)]


def required() -> Any:
    """The package ``transformers``.

    Raises:
        ExperimentError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        install = "pip install 'fedvision[pseudo-labels]', or in a checkout pip install -e '.[pseudo-labels]'"
        raise ExperimentError(f"pseudo labels need the package transformers, which is not installed; {install}") from error
    return transformers


# ---- maps -----------------------------------------------------------------------------------------------------------


def as_numbers(depth: Float[Tensor, "h w"], inverse: bool = False, scale: float | None = None) -> Int[np.ndarray, "h w"]:
    """A depth map of whole numbers from 1 to 65535, larger where it is farther.

    Args:
        depth: as it was predicted.
        inverse: whether it is larger where it is nearer. It is then turned round, so that farther is larger; the distances are
            not those of the scene, since the unit and the zero of such predictions are not known.
        scale: the number of one unit; larger numbers than there are become the largest. Without one, from the least to the greatest.

    Raises:
        DataError: values that are not finite.

    Example:
        >>> as_numbers(torch.tensor([[1.0, 2.0, 3.0]])), as_numbers(torch.tensor([[1.0, 2.0]]), inverse=True)
        (array([[    1, 32768, 65535]], dtype=uint16), array([[65535,     1]], dtype=uint16))
        >>> as_numbers(torch.tensor([[0.5, 70.0]]), scale=1000)
        array([[  500, 65535]], dtype=uint16)
    """
    values = depth.double()
    if not values.isfinite().all():
        raise DataError("the network predicts depth that is not finite; choose another, or other pictures")
    if inverse:
        values = -values
    if scale is None:
        least, greatest = values.min(), values.max()
        values = 1 + (values - least) / (greatest - least).clamp(min=torch.finfo(torch.float32).tiny) * (MOST - 1)
    else:
        values = values * scale
    return values.round().clamp(1, MOST).numpy().astype(np.uint16)


def as_bytes(classes: Int[Tensor, "h w"]) -> Int[np.ndarray, "h w"]:
    """A semantic map as bytes; numbers that are no class become 255."""
    known = (classes >= 0) & (classes < IGNORED)
    return torch.where(known, classes, IGNORED).to(torch.uint8).numpy()


def _in_one_step(path: Path, write: Callable[[Path], object]) -> None:
    """Have ``write`` fill a temporary file, then put it in place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise DataError(f"{path} cannot be written ({error}); free space, then start again: what is done is kept") from error


# ---- folders --------------------------------------------------------------------------------------------------------


def _parts(root: Path) -> list[Path]:
    """The folders that hold ``rgb``."""
    halves = [root / "train", root / "test"]
    return halves if all((half / "rgb").is_dir() for half in halves) else [existing(root / "rgb", "put the pictures there").parent]


def _pairs(part: Path, kind: str) -> list[tuple[Path, Path]]:
    """Each picture, and where its map belongs."""
    sources = pictures_below(part / "rgb")
    if not sources:
        raise DataError(f"{part / 'rgb'} holds no picture ({', '.join(ENDINGS)}); put some there")
    targets: dict[Path, Path] = {}
    for source in sources:
        target = (part / kind / source.relative_to(part / "rgb")).with_suffix(".png")
        if target in targets:
            raise DataError(f"{targets[target]} and {source} would have the same map; rename one")
        targets[target] = source
    return [(source, target) for target, source in targets.items()]


def _batches(pairs: Sequence[tuple[Path, Path]], size: int) -> Iterator[list[tuple[Path, Image.Image]]]:
    """Where maps belong, and the pictures, so many at a time."""
    for start in range(0, len(pairs), size):
        yield [(target, _read(source)) for source, target in pairs[start : start + size]]


def _read(file: Path) -> Image.Image:
    """A picture in color as it is stored, which is how data sets read it: not turned as its metadata may say."""
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{file} cannot be read: {error}; mend or remove it, then start again: what is done is kept") from error


def _check_same(root: Path, kind: Depth | Semseg, begun: bool) -> None:
    """Refuse to add to maps that another network made."""
    told = _told(root).get(kind.folder)
    ours = asdict(kind)
    if not begun or told is None or {key: told.get(key) for key in ours} == ours:
        return
    made = ", ".join(f"{key} = {told.get(key)}" for key in ours)
    raise DataError(f"maps in {root} are there already, of {kind.folder} by {made}; go on with that, or move them away")


def _tell(root: Path, kind: Depth | Semseg, classes: list[str] | None) -> None:
    entry = asdict(kind) | ({} if classes is None else {"classes": classes})
    text = json.dumps({**_told(root), kind.folder: entry}, indent=2) + "\n"
    _in_one_step(root / SIDECAR, lambda path: path.write_text(text))


def _told(root: Path) -> Mapping[str, Any]:
    file = root / SIDECAR
    if not file.exists():
        return {}
    try:
        told = json.loads(file.read_bytes())
        return {name: entry for name, entry in told.items() if isinstance(entry, dict)}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{file} cannot be read ({error}); mend or remove it") from error
