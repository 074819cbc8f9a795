"""Rows whose order means nothing, put in the order of others that they are most like."""

import torch
from flwr.app import RecordDict
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedvision import optimizers
from fedvision.arrays import Named
from fedvision.learners.learner import Learner


def matched(rows: Float[Tensor, "k ..."], others: Float[Tensor, "k ..."]) -> Int[Tensor, "k"]:
    """Which row belongs in each place, so that the sum of cosines with the other rows in these places is largest.

    Args:
        rows: whose order means nothing.
        others: in the order that is wanted.

    Source: the assignment problem, Kuhn 1955; for networks of a federation, FedMA, arXiv 2002.06440.

    >>> matched(torch.tensor([[0.0, 2.0], [1.0, 0.1]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [1, 0]
    """
    from scipy.optimize import linear_sum_assignment

    ours, theirs = (nn.functional.normalize(each.detach().double().flatten(1), dim=1) for each in (rows, others))
    places, chosen = linear_sum_assignment((theirs @ ours.T).cpu().numpy(), maximize=True)
    assert (places == range(len(rows))).all(), "scipy gives places in order"
    return torch.from_numpy(chosen).to(rows.device)


@torch.no_grad()
def arrange(learner: Learner, model: nn.Module, arrays: Named, state: RecordDict) -> None:
    """Put a model's interchangeable rows in the order of those of other arrays, and whatever goes with them.

    Args:
        learner: says which rows, see ``Learner.interchangeable``.
        model: changed in place.
        arrays: in whose order.
        state: of the silo whose model it is; what its optimizer remembers of the rows moves too.
    """
    own = model.state_dict()
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    for rows in learner.interchangeable(model):
        order = matched(own[rows.name], arrays[rows.name])
        if torch.equal(order, torch.arange(len(order), device=order.device)):
            continue
        for name in (rows.name, *rows.alike):
            own[name].copy_(own[name][order])
            optimizers.reorder(state, trained, learner.groups(model), name, order)
