"""Statistics of a comparison over paired seeds."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from fedvision.seeds import numpy_generator

RESAMPLES = 10_000
LEVEL = 0.05


@dataclass(frozen=True)
class Summary:
    """One row of a comparison.

    Attributes:
        values: one a seed, in the order of the seeds.
        mean: their mean.
        std: their sample standard deviation (n - 1); 0 for one value.
        low, high: 95% bootstrap confidence interval of the mean.
        p: of the paired t-test against the best row, Holm-corrected over the rows; 1 for the best; NaN if untestable.
        best: whether this row has the best mean.
    """

    values: tuple[float, ...]
    mean: float
    std: float
    low: float
    high: float
    p: float
    best: bool

    @property
    def tied(self) -> bool:
        """Whether this row cannot be told apart from the best at the 5% level."""
        return self.best or not self.p < LEVEL


def summarize(rows: Mapping[str, tuple[float, ...]], lower_is_better: bool = True) -> dict[str, Summary]:
    """Compare rows of values that share their seeds.

    The test is a paired t-test of each row against the row with the best mean, since seeds fix data and initial
    weights for all rows alike; Holm's method keeps the chance of any false difference in the column below 5%.
    With few seeds it has little power: a tie says that the seeds do not tell the rows apart, not that they are equal.

    Args:
        rows: values by row, each as long as the others, without NaN.
        lower_is_better: whether the best mean is the lowest.
    """
    means = {name: float(np.mean(values)) for name, values in rows.items()}
    best = (min if lower_is_better else max)(means, key=lambda name: means[name])
    others = [name for name in rows if name != best]
    corrected = dict(zip(others, holm([paired_p(rows[name], rows[best]) for name in others]), strict=True)) | {best: 1.0}
    return {name: _summary(values, corrected[name], name == best) for name, values in rows.items()}


def paired_p(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Two-sided p of the paired t-test; 1 if all pairs are equal, NaN for fewer than two pairs."""
    differences = np.asarray(a) - np.asarray(b)
    if len(differences) < 2:
        return float("nan")
    if np.ptp(differences) <= 1e-12 * max(np.abs(differences).max(), 1.0):
        return 1.0 if abs(differences[0]) < 1e-12 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p: list[float]) -> list[float]:
    """Holm's step-down correction; NaN stays NaN and does not count as a test."""
    order = [i for i in np.argsort(p) if not np.isnan(p[i])]
    corrected, highest = list(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p[i]))
        corrected[i] = highest
    return corrected


def bootstrap(values: tuple[float, ...]) -> tuple[float, float]:
    """95% percentile bootstrap interval of the mean, the same for the same values."""
    if len(values) < 2:
        return values[0], values[0]
    picks = numpy_generator(0, "bootstrap").integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.asarray(values)[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def _summary(values: tuple[float, ...], p: float, best: bool) -> Summary:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Summary(values, float(np.mean(values)), std, *bootstrap(values), p, best)
