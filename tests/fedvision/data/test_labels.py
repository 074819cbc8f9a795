import numpy as np
import pytest

from fedvision.data.labels import labeled_split
from fedvision.errors import DataError


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["bal", "imb"])
def test_a_split_is_the_references(golden, kind):
    with np.load(golden / "doublematch.npz") as file:
        arrays = {name: file[name] for name in file if name.startswith("split_")}
    if f"split_{kind}_idx" not in arrays:
        pytest.skip(f"no reference split of kind {kind}")
    labels = np.repeat(np.arange(len(arrays[f"split_{kind}_counts"])), arrays[f"split_{kind}_counts"])
    expected = arrays[f"split_{kind}_idx"]
    chosen = labeled_split(labels, len(expected), fold=1)
    assert chosen.tolist() == sorted(expected.tolist())
    assert np.bincount(labels[chosen]).tolist() == arrays[f"split_{kind}_npos"].tolist()


def test_balanced_classes_get_as_many_labels_each():
    labels = np.tile(np.arange(10), 50)
    assert np.bincount(labels[labeled_split(labels, 40, fold=3)]).tolist() == [4] * 10


def test_uneven_classes_get_labels_by_their_frequency():
    labels = np.repeat(np.arange(3), [400, 200, 100])
    assert np.bincount(labels[labeled_split(labels, 70, fold=1)]).tolist() == [40, 20, 10]


def test_indices_are_sorted_and_different():
    labels = np.tile(np.arange(4), 30)
    chosen = labeled_split(labels, 50, fold=1)
    assert (np.diff(chosen) > 0).all() and chosen[-1] < len(labels)


def test_another_fold_is_another_split_and_the_same_the_same():
    labels = np.tile(np.arange(10), 50)
    first, again, other = (labeled_split(labels, 40, fold).tolist() for fold in (1, 1, 2))
    assert first == again != other


def test_examples_without_a_label_are_never_chosen():
    labels = np.where(np.arange(100) % 2, -1, np.arange(100) % 5)
    assert (labels[labeled_split(labels, 30, fold=1)] >= 0).all()


@pytest.mark.parametrize("labels", [[0, 0, 0, 2], [1, 1], [0, 0, 0, 0, 0, 1]])
def test_all_labels_may_be_kept_and_classes_may_be_missing(labels):
    assert labeled_split(np.array(labels), len(labels), fold=1).tolist() == list(range(len(labels)))


@pytest.mark.parametrize(
    ("labels", "count", "fold", "message"),
    [
        ([0, 1, -1], 3, 1, "3 labels were asked for, of 2 labeled examples"),
        ([0, 1], 0, 1, "choose between 1 and 2"),
        ([], 1, 1, "of 0 labeled examples"),
        ([0, 1], 1, 0, "fold 0 of the labels does not exist"),
    ],
)
def test_what_cannot_be_split_is_refused(labels, count, fold, message):
    with pytest.raises(DataError, match=message):
        labeled_split(np.array(labels, dtype=np.int64), count, fold)
