"""Examples, silos, a user's own arrays, and the dealing of a pool."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvision.data import Examples, FederatedData, Pool, Silos, Spec
from fedvision.data.examples import concatenate
from fedvision.data.partitions import dirichlet, environment, iid
from fedvision.data.pool import deal
from fedvision.errors import DataError

quick = settings(max_examples=40, deadline=None)


def rng(seed=0):
    return np.random.default_rng(seed)


def examples(n, start=0, **fields):
    """n examples whose one pixel tells them apart."""
    number = torch.arange(start, start + n)
    return Examples({"image": number.float()[:, None], "label": number % 3, **fields})


def numbers(some):
    return some.image[:, 0].long().tolist()


# examples


def test_examples_of_unequal_length_are_refused():
    with pytest.raises(DataError, match=r"differ in length: \{'image': 2, 'label': 3\}"):
        Examples({"image": torch.zeros(2, 1), "label": torch.zeros(3)})


def test_examples_without_fields_have_length_zero():
    assert len(Examples({})) == 0


def test_a_slice_gives_views_and_indices_give_copies():
    some = examples(4)
    some[1:3].image[0] = 99
    assert some.image[1] == 99
    some[torch.tensor([2])].image[0] = 77
    assert some.image[2] == 2


def test_examples_know_their_fields():
    assert "label" in examples(1)
    assert "caption" not in examples(1)


@quick
@given(st.integers(0, 20), st.integers(1, 7))
def test_batches_cover_all_in_order_and_only_the_last_is_smaller(n, size):
    batches = list(examples(n).batches(size))
    assert [number for batch in batches for number in numbers(batch)] == list(range(n))
    assert all(len(batch) == size for batch in batches[:-1])


def test_examples_stay_themselves_on_their_device():
    some = examples(3)
    assert some.to("cpu").image.data_ptr() == some.image.data_ptr()


def test_concatenation_keeps_the_order():
    assert numbers(concatenate([examples(2), examples(3, start=5)])) == [0, 1, 5, 6, 7]


def test_parts_with_other_fields_or_shapes_are_refused():
    with pytest.raises(DataError, match=r"part 1 has the fields \['image'\], part 0 has \['image', 'label'\]"):
        concatenate([examples(2), Examples({"image": torch.zeros(1, 1)})])
    with pytest.raises(DataError, match=r"field 'image' of part 1 has shape \(2,\) per example, part 0 has \(1,\)"):
        concatenate([examples(2), Examples({"image": torch.zeros(1, 2), "label": torch.zeros(1)})])


# silos


def test_silos_hold_their_parts_as_views():
    silos = Silos.of([examples(2), examples(0), examples(3, start=5)])
    assert [numbers(silos[i]) for i in range(3)] == [[0, 1], [], [5, 6, 7]]
    assert silos.sizes == [2, 0, 3]
    silos[2].image[0] = 42
    assert silos.examples.image[2] == 42


def test_dealt_silos_follow_the_indices():
    silos = Silos.dealt(examples(5), [np.array([4, 0]), np.array([], dtype=np.int64), np.array([2])])
    assert [numbers(silos[i]) for i in range(3)] == [[4, 0], [], [2]]


@pytest.mark.parametrize("client", [-1, 2])
def test_there_are_no_other_clients(client):
    with pytest.raises(IndexError):
        Silos.of([examples(1), examples(1)])[client]


def test_no_parts_make_no_clients_and_federated_data_say_so():
    silos = Silos.dealt(examples(3), [])
    assert len(silos) == 0
    with pytest.raises(DataError, match="has no clients"):
        FederatedData("none", silos, None, examples(1), 3)


def test_a_client_without_training_examples_is_refused_by_number():
    with pytest.raises(DataError, match=r"client\(s\) \[1\] hold no training example"):
        FederatedData("toy", Silos.of([examples(1), examples(0)]), None, examples(1), 3)
    FederatedData("toy", Silos.of([examples(1), examples(0)]), None, examples(1), 3, elsewhere=True)
    with pytest.raises(DataError, match=r"client\(s\) \[0, 1\] hold no training example"):
        FederatedData("toy", Silos.of([examples(0), examples(0)]), None, examples(1), 3, elsewhere=True)


def test_validation_parts_must_match_the_clients():
    with pytest.raises(DataError, match="2 training parts and 1 validation parts"):
        FederatedData("toy", Silos.of([examples(1), examples(1)]), Silos.of([examples(1)]), examples(1), 3)


# a user's arrays

X, Y = np.arange(8, dtype=np.float64).reshape(4, 2), np.array([0, 1, 2, 1])


def test_arrays_become_float_inputs_and_integer_labels():
    data = FederatedData.from_arrays([(X, Y), (X[:1], Y[:1])], [(X[:2], Y[:2]), (X[:0], Y[:0])], test=(X, Y))
    assert data.train.sizes == [4, 1]
    assert data.validation.sizes == [2, 0]
    assert data.spec == Spec((2,), 3)
    assert data.train[0].image.dtype == torch.float32
    assert data.train[0].label.dtype == torch.int64
    assert data.train[0].image.tolist() == X.tolist()


@pytest.mark.parametrize("y", [[0.0, 1.0, 0.0, 1.0], [[0], [1], [0], [1]], [False, True, False, True], torch.tensor([0, 1, 0, 1])])
def test_binary_labels_come_in_many_forms(y):
    data = FederatedData.from_arrays([(X, y)], test=(X, y))
    assert data.train[0].label.tolist() == [0, 1, 0, 1]
    assert data.classes == 2


def test_the_users_arrays_are_copied():
    x = X.astype(np.float32)
    data = FederatedData.from_arrays([(x, Y)], test=(x, Y))
    x[0, 0] = 100
    assert data.train[0].image[0, 0] == 0


@pytest.mark.parametrize("x", [X[::-1], X.T.copy().T, X.astype(">f8"), X.astype(">i2"), X.astype(np.float16), X.tolist(), X.astype(bool)])
def test_arrays_come_in_any_layout(x):
    data = FederatedData.from_arrays([(x, Y)], test=(x, Y))
    assert data.train[0].image.tolist() == np.asarray(x).astype(float).tolist()


def test_classes_can_be_more_than_are_seen_but_not_fewer():
    assert FederatedData.from_arrays([(X, Y)], test=(X, Y), classes=7).classes == 7
    with pytest.raises(DataError, match="label 2 does not fit classes = 2"):
        FederatedData.from_arrays([(X, Y)], test=(X, Y), classes=2)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "has no clients"),
        ([(X,)], r"train\[0\] is not a pair"),
        ([(X, Y), 3], r"train\[1\] is not a pair"),
        ([(X, Y[:2])], r"train\[0\]: 4 inputs but 2 labels"),
        ([(X, Y - 2)], r"train\[0\]: labels must be class indices"),
        ([(X, Y + 0.5)], "labels must be class indices"),
        ([(X, Y * np.nan)], "labels must be class indices"),
        ([(X[:, 0], Y)], r"inputs have shape \(4,\)"),
        ([(X, np.zeros((4, 2)))], r"labels \(4, 2\); give inputs"),
        ([(X.astype(str), Y)], r"train\[0\] inputs have the type <U32; give numbers"),
        ([(X, Y), (X[:, :1], Y)], r"field 'image' of part 1 has shape \(1,\)"),
        ([(X[:, :1], Y)], "inputs differ in shape"),
        ([(X[:0], Y[:0])], r"client\(s\) \[0\] hold no training example"),
    ],
)
def test_wrong_arrays_are_refused_with_the_reason(train, message):
    with pytest.raises(DataError, match=message), np.errstate(invalid="ignore"):
        FederatedData.from_arrays(train, test=(X, Y))


def test_the_digest_changes_with_every_value_and_only_then():
    def digest(x=X, y=Y, name="toy", clients=1, classes=5, validation=None):
        return FederatedData.from_arrays([(x, y)] * clients, validation, test=(X, Y), name=name, classes=classes).digest

    other = X.copy()
    other[3, 1] += 1e-3
    digests = [
        digest(),
        digest(x=other),
        digest(y=Y[::-1]),
        digest(name="boy"),
        digest(clients=2),
        digest(classes=6),
        digest(validation=[(X, Y)]),
        digest(validation=[(X[:0], Y[:0])]),
    ]
    assert digest() == digest()
    assert len(set(digests)) == len(digests)


def test_data_stay_themselves_on_their_device():
    data = FederatedData.from_arrays([(X, Y)], test=(X, Y))
    assert data.to(torch.device("cpu")) is data


def test_participants_keep_their_examples_and_are_counted_anew():
    data = FederatedData.from_arrays([(X + i, Y) for i in range(4)], [(X - i, Y) for i in range(4)], test=(X, Y))
    some = data.only([3, 1])
    assert some.num_clients == 2
    assert torch.equal(some.train[0].image, data.train[3].image)
    assert torch.equal(some.validation[1].image, data.validation[1].image)
    assert some.test is data.test


@pytest.mark.parametrize("clients", [[], [4], [-1], [1, 1]])
def test_participants_that_do_not_exist_are_refused(clients):
    data = FederatedData.from_arrays([(X, Y)] * 4, test=(X, Y))
    with pytest.raises(DataError, match=r"participants = .* of 4 clients; name some of 0 to 3, each once"):
        data.only(clients)


# dealing


def pool_of(n=60, validation=None, **fields):
    return Pool(examples(n, **fields), examples(5, start=1000), 3, validation)


def halves(labels, rng):
    return [np.arange(len(labels) // 2), np.arange(len(labels) // 2, len(labels))]


def test_deal_without_validation_gives_each_client_its_part():
    data = deal("toy", pool_of(10), halves, {}, 0.0, rng())
    assert [numbers(data.train[i]) for i in range(2)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert data.validation is None
    assert numbers(data.test) == [1000, 1001, 1002, 1003, 1004]


@quick
@given(st.floats(0.01, 0.99), st.integers(0, 99))
def test_clients_hold_back_a_fraction_of_their_own(fraction, seed):
    data = deal("toy", pool_of(60), halves, {}, fraction, rng(seed))
    for client, own in ((0, range(30)), (1, range(30, 60))):
        held = numbers(data.validation[client])
        assert len(held) == int(30 * fraction)
        assert sorted(numbers(data.train[client]) + held) == list(own)


def test_held_back_examples_are_drawn_with_the_generator():
    one, again, other = (deal("toy", pool_of(), halves, {}, 0.5, rng(seed)) for seed in (1, 1, 2))
    assert one.digest == again.digest
    assert one.digest != other.digest


def test_holding_back_everything_is_refused():
    with pytest.raises(DataError, match="hold no training example"):
        deal("toy", pool_of(), halves, {}, 1.0, rng())


def test_settings_reach_the_partition():
    assert deal("toy", pool_of(), iid, {"clients": 7}, 0.0, rng()).num_clients == 7


def test_a_partition_gets_only_what_it_names():
    def nosy(environments):
        return [np.flatnonzero(environments == 1)]

    data = deal("toy", pool_of(4, environment=torch.tensor([0, 1, 1, 0])), nosy, {}, 0.0, rng())
    assert numbers(data.train[0]) == [1, 2]


def test_data_without_environments_or_labels_say_which_partitions_are_left():
    with pytest.raises(DataError, match="no environments; choose another partition, such as 'dirichlet'"):
        deal("toy", pool_of(), environment, {}, 0.0, rng())
    unlabeled = Pool(Examples({"image": torch.zeros(3, 1)}), examples(1), 3)
    with pytest.raises(DataError, match="no class labels; choose another partition, such as 'environment'"):
        deal("toy", unlabeled, iid, {}, 0.0, rng())
    with pytest.raises(DataError, match="no environments"):
        deal("toy", pool_of(3, validation=examples(3), environment=torch.zeros(3).long()), environment, {}, 0.0, rng())


def test_a_validation_set_follows_its_environments():
    validation = examples(4, start=100, environment=torch.tensor([1, 0, 1, 0]))
    data = deal("toy", pool_of(4, validation, environment=torch.tensor([0, 0, 1, 1])), environment, {}, 0.5, rng())
    assert [numbers(data.train[i]) for i in range(2)] == [[0, 1], [2, 3]]
    assert [numbers(data.validation[i]) for i in range(2)] == [[101, 103], [100, 102]]


def test_a_validation_set_without_one_environment_leaves_that_client_without():
    validation = examples(2, start=100, environment=torch.tensor([2, 0]))
    data = deal("toy", pool_of(3, validation, environment=torch.tensor([0, 1, 2])), environment, {}, 0.5, rng())
    assert [numbers(data.validation[i]) for i in range(3)] == [[101], [], [100]]


def test_a_client_validates_on_the_classes_it_trains_on():
    train, validation = examples(3000), examples(3000, start=3000)
    data = deal("toy", Pool(train, examples(1), 3, validation), dirichlet, {"clients": 3, "alpha": 0.3}, 0.5, rng())
    for client in range(3):
        trained, held = (np.bincount(silos[client].label.numpy(), minlength=3) for silos in (data.train, data.validation))
        assert (np.abs(trained - held) <= 4 * np.sqrt(trained + held)).all()
    together = [number for silos in (data.train, data.validation) for i in range(3) for number in numbers(silos[i])]
    assert sorted(together) == list(range(6000))
