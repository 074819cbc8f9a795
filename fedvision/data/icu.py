"""Tables of patients from many hospitals: a user's own (eICU), and synthetic ones that need no access.

An example is one patient: the field ``image`` is the row of features [F], ``label`` 0 or 1, ``environment`` the hospital.

Source: FedILC, arXiv 2205.09305, section 5 (eICU).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedvision.data.digits import stratified
from fedvision.data.examples import ENVIRONMENT, IMAGE, LABEL, Examples
from fedvision.data.pool import Pool
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import Count, Natural, NonNegative, PositiveFraction, nearest

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Table:
    """Patients of many hospitals.

    Attributes:
        features: float32 [n, F].
        labels: int64 [n], 1 for the event (death).
        hospitals: int64 [n], numbers from 0; ``names[hospital]`` is what the source calls it.
        names: one per hospital.
        source: where the table is from, for messages.
        remedy: what to change if a hospital has too few events.
    """

    features: np.ndarray
    labels: np.ndarray
    hospitals: np.ndarray
    names: tuple[str, ...]
    source: str
    remedy: str


@datasets("synthetic-icu")
def synthetic_icu(
    *,
    hospitals: Count = 20,
    test_hospitals: Count = 10,
    patients: Count = 400,
    causal: Count = 10,
    spurious: Natural = 10,
    noise: Natural = 20,
    mortality: PositiveFraction = 0.12,
    causal_strength: NonNegative = 2.0,
    spurious_strength: NonNegative = 1.0,
    agreements: tuple[float, float] = (1.0, -0.4),
    test_agreement: float = -1.0,
    train_fraction: PositiveFraction = 0.7,
    rng: np.random.Generator,
) -> Pool:
    """Synthetic intensive care, no real patients: tables of hospitals in which some features mislead elsewhere.

    Of the features, the first are causal: the event follows from them by one logistic rule in every hospital. The next
    are spurious: they follow from the event, by a strength and sign of the hospital's own. The last are noise. Training
    hospitals agree with the rule "spurious feature up, event likely" from ``agreements[0]`` evenly down to
    ``agreements[1]``; the test hospitals by ``test_agreement``: what pays in training is wrong there.

        event    = [causal_strength * (x . w) / |w| + logistic noise > t],  t: mortality of all patients have the event
        spurious = agreement * spurious_strength * (+1 if event else -1) / sqrt(spurious) + normal noise

    Args:
        hospitals: that train; their patients are split and over-sampled as those of ``eicu``.
        test_hospitals: whose patients are the out-of-distribution test set.
        patients: per hospital.
        causal: number of causal features.
        spurious: number of spurious features.
        noise: number of features that say nothing.
        mortality: share of all patients with the event.
        causal_strength: of the causal features together, against logistic noise of scale 1.
        spurious_strength: of the spurious features together, against normal noise of deviation 1.
        agreements: of the first and the last training hospital.
        test_agreement: of every test hospital.
        train_fraction: of a training hospital's patients, the others validate.
        rng: draws every value.

    Raises:
        DataError: so few patients that a training hospital has none with, or none without, the event.
    """
    number = np.repeat(np.arange(hospitals + test_hospitals), patients)
    x = rng.standard_normal((len(number), causal))
    w = rng.standard_normal(causal)
    score = causal_strength * (x @ w) / np.linalg.norm(w) + rng.logistic(size=len(number))
    event = score > np.quantile(score, 1 - mortality)
    agreement = np.concatenate([np.linspace(*agreements, hospitals), np.full(test_hospitals, test_agreement)])[number]
    hint = agreement * np.where(event, 1, -1) * spurious_strength / np.sqrt(max(spurious, 1))
    features = [x, hint[:, None] + rng.standard_normal((len(number), spurious)), rng.standard_normal((len(number), noise))]
    table = Table(
        features=np.concatenate(features, axis=1).astype(np.float32),
        labels=event.astype(np.int64),
        hospitals=number,
        names=tuple(str(hospital) for hospital in range(hospitals + test_hospitals)),
        source="synthetic-icu",
        remedy=f"raise patients (now {patients})",
    )
    return hospital_pool(table, hospitals, train_fraction, rng)


@datasets("eicu")
def eicu(
    *,
    path: str,
    hospital_column: str = "hospitalid",
    label_column: str = "death",
    hospitals: Count = 20,
    train_fraction: PositiveFraction = 0.7,
    standardize: bool = False,
    rng: np.random.Generator,
) -> Pool:
    """A CSV table of patients, as extracted from eICU: one row a patient, a hospital, a 0/1 label, numeric features.

    The ``hospitals`` hospitals with the most patients train, numbered by falling size (equal sizes: by their order in
    the sorted column). Each keeps as many patients, drawn at random, as the smallest of them has. These are split with
    equal shares of deaths; in the training part the minority class is over-sampled until both are equal. All patients
    of all other hospitals are the out-of-distribution test set.

    Args:
        path: the file.
        hospital_column: says which hospital, by number or name.
        label_column: 1 for the event, 0 otherwise.
        hospitals: how many train.
        train_fraction: of a training hospital's patients, the others validate.
        standardize: subtract the mean and divide by the deviation of each feature over all training patients
            (before over-sampling); a constant feature becomes 0. The published protocol says nothing of it, so it is off.
        rng: draws which patients are kept, the split, and the over-sampling.

    Raises:
        DataError: a file that cannot be read, a missing or non-numeric column, missing values, labels other than 0 and 1,
            too few hospitals, or a training hospital of a single class.
    """
    frame = _read(Path(path))
    for setting, column in (("hospital_column", hospital_column), ("label_column", label_column)):
        if column not in frame.columns:
            raise DataError(f"{path} has no column {column!r} ({setting}); {nearest(column, list(frame.columns)[:50])}")
    table = _table(frame, hospital_column, label_column, path)
    if len(table.names) <= hospitals:
        raise DataError(
            f"{path}: {hospital_column!r} names {len(table.names)} hospital(s), of which {hospitals} should train and at least one other "
            f"be the test set; set hospitals to at most {len(table.names) - 1}"
        )
    return hospital_pool(table, hospitals, train_fraction, rng, standardize)


def hospital_pool(table: Table, hospitals: int, train_fraction: float, rng: np.random.Generator, standardize: bool = False) -> Pool:
    """The pool of a table whose hospitals 0 .. ``hospitals`` - 1 train, all others test.

    Raises:
        DataError: a training hospital of a single class.
    """
    rows = [np.flatnonzero(table.hospitals == hospital) for hospital in range(hospitals)]
    smallest = min(len(some) for some in rows)
    splits = [_split(table, rng.permutation(some)[:smallest], train_fraction, rng) for some in rows]
    seen = np.concatenate([train for train, _ in splits])
    features = _standardized(table.features, seen) if standardize else table.features
    train = np.concatenate([_balanced(some, table.labels, rng) for some, _ in splits])
    validation = np.concatenate([held for _, held in splits])
    tested = np.flatnonzero(table.hospitals >= hospitals)
    parts = [_patients(table, features, some) for some in (train, tested, validation)]
    return Pool(parts[0], parts[1], classes=2, validation=parts[2])


def _split(table: Table, rows: np.ndarray, train_fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one hospital to train and to validate on, stratified; both classes must be there to train on."""
    train, held = (rows[some] for some in stratified(table.labels[rows], train_fraction, rng))
    events = int(table.labels[train].sum())
    if events in (0, len(train)):
        raise DataError(
            f"{table.source}: hospital {table.names[table.hospitals[rows[0]]]} has {events} of {len(train)} training patients with the "
            f"event, so its minority class cannot be over-sampled; {table.remedy}"
        )
    return train, held


def _balanced(rows: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All rows, and rows of the minority class once more, drawn with replacement until both classes are equal; shuffled."""
    zeros, ones = rows[labels[rows] == 0], rows[labels[rows] == 1]
    fewer = min(zeros, ones, key=len)
    more = rng.choice(fewer, size=abs(len(zeros) - len(ones)))
    return rng.permutation(np.concatenate([rows, more]))


def _standardized(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Features with mean 0 and deviation 1 over ``rows``; 0 where they are constant there."""
    mean, deviation = features[rows].mean(axis=0, dtype=np.float64), features[rows].std(axis=0, dtype=np.float64)
    varies = features[rows].min(axis=0) < features[rows].max(axis=0)
    return np.where(varies, (features - mean) / np.where(varies, deviation, 1), 0).astype(np.float32)


def _patients(table: Table, features: np.ndarray, rows: np.ndarray) -> Examples:
    fields = {IMAGE: features, LABEL: table.labels, ENVIRONMENT: table.hospitals}
    return Examples({name: torch.from_numpy(values[rows]) for name, values in fields.items()})


def _read(path: Path) -> "pandas.DataFrame":
    import pandas

    try:
        return pandas.read_csv(path, low_memory=False)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise DataError(f"{path} cannot be read as a CSV table: {error}; give the path of a comma-separated file with a header") from error


def _table(frame: "pandas.DataFrame", hospital_column: str, label_column: str, path: str) -> Table:
    """A checked table; hospitals are numbered by falling size."""
    import pandas

    _complete(frame, path)
    measured = frame.drop(columns=[hospital_column, label_column])
    wordy = [column for column in measured.columns if not pandas.api.types.is_numeric_dtype(measured[column])]
    if wordy or measured.shape[1] == 0:
        found = f"{len(wordy)} feature column(s) that are not numbers: {', '.join(map(repr, wordy[:10]))}" if wordy else "no feature column"
        raise DataError(f"{path} has {found}; encode or drop them, and leave at least one numeric feature")
    number, names = _by_size(frame[hospital_column])
    return Table(
        features=_finite(measured, path),
        labels=_binary(frame[label_column], path),
        hospitals=number,
        names=names,
        source=path,
        remedy=f"lower hospitals, or drop the rows of that hospital in {hospital_column!r}, or check {label_column!r}",
    )


def _complete(frame: "pandas.DataFrame", path: str) -> None:
    """No cell is empty."""
    empty = frame.isna().sum()
    empty = empty[empty > 0]
    if len(empty):
        worst = ", ".join(f"{column!r} ({count})" for column, count in empty.head(10).items())
        raise DataError(f"{path} has missing values in {len(empty)} column(s): {worst}; fill them in or drop those rows or columns")
    if not len(frame):
        raise DataError(f"{path} has a header but no rows; give one row per patient")


def _by_size(column: "pandas.Series") -> tuple[np.ndarray, tuple[str, ...]]:
    """Hospital numbers by falling size, int64 [n], and the names that the file gives them."""
    code, names = column.factorize(sort=True)
    order = np.argsort(-np.bincount(code), kind="stable")
    return np.argsort(order)[code], tuple(str(names[i]) for i in order)


def _binary(column: "pandas.Series", path: str) -> np.ndarray:
    """Labels 0 and 1, int64 [n]."""
    known = column.unique().tolist()
    if not set(known) <= {0, 1}:
        raise DataError(f"{path}: label column {column.name!r} holds {known[:5]}; give 1 for the event and 0 otherwise")
    return column.to_numpy().astype(np.int64)


def _finite(measured: "pandas.DataFrame", path: str) -> np.ndarray:
    """Features as float32 [n, F]."""
    with np.errstate(over="ignore"):
        features = measured.to_numpy(dtype=np.float64).astype(np.float32)
    broken = measured.columns[np.flatnonzero(~np.isfinite(features).all(axis=0))]
    if len(broken):
        raise DataError(
            f"{path} has infinite values, or values too large for float32, in {', '.join(map(repr, broken[:10]))}; mend or drop them"
        )
    return features
