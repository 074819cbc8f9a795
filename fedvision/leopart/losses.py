"""Leopart's loss: what one crop says of a region is predicted from another crop, cell by cell.

Letters in shapes: b = pictures, g = crops that teach, v = crops that predict, k = prototypes, o = cells a side.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# ---- regions --------------------------------------------------------------------------------------------------------


def aligned(maps: Float[Tensor, "m c h w"], boxes: Float[Tensor, "m r 4"], cells: int) -> Float[Tensor, "m r c o o"]:
    """Of each map some regions, each cut into ``cells`` x ``cells`` cells: the mean of samples in each cell.

    Samples are as many a side as a cell is wide, rounded up, evenly spaced, and interpolated bilinearly between the centers of places;
    beyond the outermost centers they are as there.

    Args:
        maps: values at places.
        boxes: left, top, right and bottom of regions in places; place i reaches from i to i + 1.
        cells: of each side.

    Source: RoIAlign, Mask R-CNN, arXiv 1703.06870, as torchvision's ``roi_align(aligned=True)``.
    Differs: two matrix products, one for rows and one for columns, instead of a loop over samples: the same numbers up to rounding,
        gradients that ``torch.func`` knows, and that are the same every time on a GPU.
    """
    height, width = maps.shape[-2:]
    down, across = _weights(boxes[..., 1::2], height, cells), _weights(boxes[..., ::2], width, cells)
    rows = torch.einsum("mchw,mrxw->mrchx", maps, across)
    return torch.einsum("mrchx,mryh->mrcyx", rows, down)


def _weights(spans: Float[Tensor, "m r 2"], places: int, cells: int) -> Float[Tensor, "m r o places"]:
    """How much each place counts in each cell of a span."""
    begin, extent = spans[..., 0] - 0.5, spans[..., 1] - spans[..., 0]
    cell = extent / cells
    counts = cell.ceil().clamp(min=1)
    sample = torch.arange(max(int(counts.max()), 1), device=spans.device)
    offsets = torch.arange(cells, device=spans.device)[:, None] + (sample + 0.5) / counts[..., None, None]  # m r o samples, in cells
    at = begin[..., None, None] + offsets * cell[..., None, None]
    counted = (sample < counts[..., None, None]) & (at >= -1) & (at <= places) & (cell > 0)[..., None, None]
    near = 1 - (at.clamp(0, places - 1)[..., None] - torch.arange(places, device=spans.device)).abs()
    return (near.clamp(min=0) * counted[..., None]).sum(-2) / counts[..., None, None]


@torch.no_grad()
def region_mask(masks: Bool[Tensor, "b g rows columns"], boxes: Float[Tensor, "b g v 4"], cells: int) -> Bool[Tensor, "b g v o o"]:
    """Which cells of the regions lie within masks altogether: where torchvision's ``roi_align`` of the mask is no less than 1.

    By rounding some cells that do are 0.9999999 and are left out; which ones, its sums decide, so it is its sums that are taken here.

    Args:
        masks: of the crops that teach.
        boxes: of the regions that they share with each crop, in places.
        cells: of each side.
    """
    from torchvision.ops import roi_align

    maps, (n, teachers, crops, _) = masks.flatten(0, 1)[:, None].to(boxes.dtype), boxes.shape
    found = roi_align(maps, list(boxes.flatten(0, 1)), cells, aligned=True)
    return (found >= 1).view(n, teachers, crops, cells, cells)  # type: ignore[no-any-return]


# ---- the loss -------------------------------------------------------------------------------------------------------


def cell_errors(
    predictions: Float[Tensor, "b g v k o o"], targets: Float[Tensor, "b g v k o o"], temperature: float
) -> Float[Tensor, "b g v o o"]:
    """-sum_k q_k log softmax(p / temperature)_k of each cell.

    Args:
        predictions: p, how much crop v's cells are like each prototype.
        targets: q, to which prototypes crop g's patches were assigned.
        temperature: above 0; the lower, the sharper.

    Source: arXiv 2204.13101, equation 2.
    """
    return -(targets * (predictions / temperature).log_softmax(3)).sum(3)


def swapped_loss(errors: Float[Tensor, "b g v o o"], counted: Bool[Tensor, "b g v o o"] | None = None) -> Float[Tensor, ""]:
    """1/2 sum_g 1/(V - 1) sum_{v != g} mean over the cells of all pictures that count.

    Crop g is the first ones of the crops v. Where no cell of a pair counts its error is 0, and it counts in V - 1 all the same. Without
    any cell at all the loss is 0 and depends on the network, with a gradient of zeros.

    Args:
        errors: of each cell.
        counted: which cells count; all if not given.

    Source: arXiv 2204.13101, equations 3 and 4.
    """
    counted = torch.ones_like(errors, dtype=torch.bool) if counted is None else counted
    sums, numbers = (errors * counted).sum((0, 3, 4)), counted.sum((0, 3, 4))
    each = sums / numbers.clamp(min=1)
    teachers, crops = each.shape
    other = ~torch.eye(teachers, crops, dtype=torch.bool, device=each.device)
    return (each * other).sum() / (teachers * max(crops - 1, 1))


# ---- the queue ------------------------------------------------------------------------------------------------------


def drawn_features(
    embeddings: Float[Tensor, "patches features"], order: Int[Tensor, "chosen"], number: int
) -> Float[Tensor, "number features"]:
    """The first vectors in an order, for a queue; rows of zeros where there are not enough.

    Args:
        embeddings: of patches.
        order: a random one of those that may be drawn.
        number: how many.
    """
    chosen = embeddings[order[:number]]
    return torch.cat([chosen, chosen.new_zeros(number - len(chosen), embeddings.shape[1])])
