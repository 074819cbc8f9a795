"""Client-level differential privacy at the server: a random cohort, clipped changes, noise in their sum."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedvision.arrays import Named
from fedvision.privacy import Entropy, Privacy, clipping_factors, entropy
from fedvision.seeds import generator


@dataclass(frozen=True)
class Guard:
    """What stands between the clients' answers and the mean that a strategy takes of them.

    Each client is in a round's cohort with probability q, independently, so that the accountant's Poisson sampling is what happens. With
    Delta_k the change of all trained parameters together that client k sends, C the clipping norm, z the noise multiplier and N the
    number of clients, the strategy is given the model moved by

        (sum_k Delta_k min(1, C / ||Delta_k||) + z C xi) / (q N),    xi standard normal

    whether or not anybody has answered. Arrays that are not trained stay as they were sent.

    Attributes:
        privacy: of the experiment.
        noise_multiplier: z.
        rate: q.
        trained: the names of the parameters that clients train.
        seed: of cohorts, and of the noise.

    Source: McMahan et al., arXiv 1710.06963, algorithm 1, with the fixed-denominator estimator.
    """

    privacy: Privacy
    noise_multiplier: float
    rate: float
    trained: frozenset[str]
    seed: int

    def cohort(self, nodes: Sequence[int], server_round: int) -> list[int]:
        """Those of the connected clients that take part."""
        drawn = entropy(self.privacy.secure, generator(self.seed, "private cohort", server_round)).fractions(len(nodes))
        return [node for node, number in zip(nodes, drawn.tolist(), strict=True) if number < self.rate]

    def clipped(self, records: Mapping[str, Named], arrays: Named) -> dict[str, dict[str, Tensor]]:
        """An answer whose change of the model ``arrays`` is at most ``clipping_norm`` long; what it leaves out is no change."""
        changes = {record: self._changes(sent, arrays) for record, sent in records.items() if record != "buffers"}
        norms = [change.double().norm() for changed in changes.values() for change in changed.values()]
        factor = clipping_factors(torch.stack(norms).norm().reshape(1), self.privacy.clipping_norm).item() if norms else 1.0
        return {record: {name: arrays[name] + factor * change for name, change in changed.items()} for record, changed in changes.items()}

    def released(self, means: Mapping[str, Named], arrays: Named, answers: int, population: int, server_round: int) -> dict[str, Named]:
        """What the strategy is given in place of the means of ``answers`` clipped answers."""
        expected = self.rate * population
        noise = entropy(self.privacy.secure, generator(self.seed, "noise", server_round))
        spread = self.noise_multiplier * self.privacy.clipping_norm / expected if self.noise_multiplier else 0.0  # of inf too
        return {record: self._moved(mean, arrays, answers / expected, spread, noise) for record, mean in means.items()}

    def _changes(self, sent: Named, arrays: Named) -> dict[str, Tensor]:
        return {name: sent[name] - arrays[name] if name in sent else torch.zeros_like(arrays[name]) for name in sorted(self.trained)}

    def _moved(self, mean: Named, arrays: Named, share: float, spread: float, noise: Entropy) -> dict[str, Tensor]:
        moved = {}
        for name in sorted(self.trained):
            change = share * (mean[name] - arrays[name]) if name in mean else torch.zeros_like(arrays[name])
            moved[name] = arrays[name] + change + (spread * noise.gaussian(change) if spread else 0)
        return moved
