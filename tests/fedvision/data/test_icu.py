"""Hospital tables: the synthetic ones mislead as they say, a user's own is split as published or refused with a remedy."""

import numpy as np
import pandas as pd
import pytest
import torch

from fedvision.data.icu import eicu, synthetic_icu
from fedvision.data.partitions import environment
from fedvision.data.pool import deal
from fedvision.errors import DataError
from fedvision.registry import datasets
from fedvision.settings import resolve


def rng(seed=0):
    return np.random.default_rng(seed)


def frame_of(sizes, seed=0):
    """Hospitals named 10, 11, ... with the given numbers of patients; feature `row` identifies each patient."""
    hospital = np.repeat(np.arange(len(sizes)) + 10, sizes)
    n = len(hospital)
    death = np.concatenate([np.arange(size) % 5 == 0 for size in sizes]).astype(int)
    frame = pd.DataFrame({"row": np.arange(n), "age": rng(seed).normal(60, 10, n), "constant": 1.0, "hospitalid": hospital, "death": death})
    return frame.sample(frac=1, random_state=seed)


def write(folder, frame):
    path = folder / "patients.csv"
    frame.to_csv(path, index=False)
    return str(path)


def patients(examples):
    return examples.image[:, 0].long().tolist()


# a user's table


def test_the_largest_hospitals_train_and_all_others_test(tmp_path):
    frame = frame_of([30, 50, 10, 40, 20])
    pool = eicu(path=write(tmp_path, frame), hospitals=2, rng=rng())
    home = frame.set_index("row")["hospitalid"]
    for part in (pool.train, pool.validation):
        assert [home[row] for row in patients(part)] == [[11, 13][e] for e in part.fields["environment"].tolist()]
    assert sorted(patients(pool.test)) == sorted(frame.loc[~frame["hospitalid"].isin([11, 13]), "row"])
    assert [{10: 2, 14: 3, 12: 4}[home[row]] for row in patients(pool.test)] == pool.test.fields["environment"].tolist()


def test_each_training_hospital_is_cut_to_the_smallest_and_split_70_to_30(tmp_path):
    pool = eicu(path=write(tmp_path, frame_of([30, 50, 10, 40, 20])), hospitals=3, rng=rng())
    for hospital in range(3):
        train = set(patients(pool.train[pool.train.fields["environment"] == hospital]))
        held = patients(pool.validation[pool.validation.fields["environment"] == hospital])
        assert len(train) + len(held) == 30
        assert len(train) == 21
        assert len(set(held)) == len(held)
        assert not train & set(held)


def test_the_split_keeps_the_share_of_deaths(tmp_path):
    pool = eicu(path=write(tmp_path, frame_of([100, 100, 50])), hospitals=2, rng=rng())
    for hospital in range(2):
        held = pool.validation[pool.validation.fields["environment"] == hospital]
        assert (len(held), int(held.label.sum())) == (30, 6)


def test_the_minority_is_over_sampled_in_training_only_and_nothing_is_lost(tmp_path):
    pool = eicu(path=write(tmp_path, frame_of([100, 100, 50])), hospitals=2, rng=rng())
    for hospital in range(2):
        train = pool.train[pool.train.fields["environment"] == hospital]
        assert torch.bincount(train.label).tolist() == [56, 56]
        survivors = [row for row, label in zip(patients(train), train.label, strict=True) if label == 0]
        dead = [row for row, label in zip(patients(train), train.label, strict=True) if label == 1]
        assert len(set(survivors)) == 56
        assert len(set(dead)) == 14
    assert pool.validation.label.float().mean() == pytest.approx(0.2)
    assert pool.test.label.float().mean() == pytest.approx(0.2)


def test_a_table_where_death_is_the_majority_is_balanced_too(tmp_path):
    frame = frame_of([50, 20])
    frame["death"] = 1 - frame["death"]
    pool = eicu(path=write(tmp_path, frame), hospitals=1, rng=rng())
    assert torch.bincount(pool.train.label).tolist() == [28, 28]


def test_features_and_labels_stay_together_and_in_the_order_of_columns(tmp_path):
    frame = frame_of([30, 20])
    pool = eicu(path=write(tmp_path, frame), hospitals=1, rng=rng())
    known = frame.set_index("row")
    assert pool.train.image.shape[1:] == (3,)
    for part in (pool.train, pool.validation, pool.test):
        rows = patients(part)
        assert part.label.tolist() == known.loc[rows, "death"].tolist()
        torch.testing.assert_close(part.image[:, 1], torch.tensor(known.loc[rows, "age"].to_numpy(np.float32)))


def test_a_table_is_left_as_it_is_unless_standardized(tmp_path):
    path = write(tmp_path, frame_of([40, 40, 30]))
    plain, scaled = (eicu(path=path, hospitals=2, standardize=standardize, rng=rng()) for standardize in (False, True))
    rows = np.unique(plain.train.image.numpy(), axis=0).astype(np.float64)  # each training patient once
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    for before, after in ((plain.train, scaled.train), (plain.validation, scaled.validation), (plain.test, scaled.test)):
        wanted = (before.image[:, :2].numpy() - mean[:2]) / deviation[:2]
        np.testing.assert_allclose(after.image[:, :2].numpy(), wanted, atol=1e-4)
        assert after.image[:, 2].eq(0).all()
        assert before.image[:, 2].eq(1).all()


def test_the_same_generator_gives_the_same_table_split(tmp_path):
    path = write(tmp_path, frame_of([40, 40, 30]))
    one, again, other = (eicu(path=path, hospitals=2, rng=rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.train.image, again.train.image)
    assert not torch.equal(one.train.image, other.train.image)


def test_hospitals_may_have_names_and_columns_other_names(tmp_path):
    frame = frame_of([30, 50, 20]).rename(columns={"hospitalid": "clinic", "death": "died"})
    frame["clinic"] = frame["clinic"].map({10: "Ober", 11: "Unter", 12: "Mittel"})
    frame["died"] = frame["died"].astype(bool)
    pool = eicu(path=write(tmp_path, frame), hospital_column="clinic", label_column="died", hospitals=1, rng=rng())
    assert len(pool.validation) == 15
    assert len(pool.test) == 50


def test_a_table_becomes_one_client_per_hospital(tmp_path):
    pool = eicu(path=write(tmp_path, frame_of([40, 30, 20, 20])), hospitals=3, rng=rng())
    data = deal("eicu", pool, environment, {}, 0.2, rng())
    assert data.num_clients == 3
    assert data.validation.sizes == [6, 6, 6]
    assert data.spec.image_shape == (3,)


def spoiled(column, value, sizes=(30, 30, 20)):
    frame = frame_of(sizes)
    frame[column] = frame[column].astype(object)
    frame.iloc[3, frame.columns.get_loc(column)] = value
    return frame


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (
            frame_of([30, 20]).rename(columns={"hospitalid": "hospital"}),
            r"no column 'hospitalid' \(hospital_column\); did you mean 'hospital'",
        ),
        (frame_of([30, 20]).rename(columns={"death": "outcome"}), r"no column 'death' \(label_column\)"),
        (spoiled("age", None), r"missing values in 1 column\(s\): 'age' \(1\); fill them in"),
        (spoiled("hospitalid", None), r"missing values in 1 column\(s\): 'hospitalid' \(1\)"),
        (spoiled("age", "old"), r"1 feature column\(s\) that are not numbers: 'age'; encode or drop"),
        (spoiled("age", "inf"), r"infinite values.* in 'age'; mend or drop"),
        (spoiled("age", 1e300), r"too large for float32, in 'age'"),
        (spoiled("death", 2), "label column 'death' holds .*; give 1 for the event and 0 otherwise"),
        (spoiled("death", "yes"), "label column 'death' holds "),
        (frame_of([30, 20])[["hospitalid", "death"]], "no feature column"),
        (frame_of([30, 20])[:0], "a header but no rows"),
        (frame_of([50]), r"names 1 hospital\(s\), of which 1 should train .* set hospitals to at most 0"),
        (frame_of([30, 20]).assign(death=0), r"hospital 10 has 0 of 21 training patients .*; lower hospitals"),
        (frame_of([30, 20]).assign(death=1), r"hospital 10 has 21 of 21 training patients"),
    ],
)
def test_a_wrong_table_is_refused_with_file_column_and_remedy(tmp_path, frame, message):
    path = write(tmp_path, frame)
    with pytest.raises(DataError, match=message) as caught:
        eicu(path=path, hospitals=1, rng=rng())
    assert path in str(caught.value)


@pytest.mark.parametrize("content", [b"", b'a,b\n"1,2\n', b"\xff\xfe\x00"])
def test_a_file_that_is_no_table_is_refused(tmp_path, content):
    path = tmp_path / "patients.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"patients.csv (cannot be read as a CSV table|has no column)"):
        eicu(path=str(path), rng=rng())


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "nowhere.csv", tmp_path):
        with pytest.raises(DataError, match=r"cannot be read as a CSV table: .*; give the path"):
            eicu(path=str(path), rng=rng())


# synthetic hospitals


def test_synthetic_icu_is_registered_and_says_that_it_is_synthetic():
    assert "Synthetic" in datasets.summary("synthetic-icu")
    assert resolve(datasets.find("synthetic-icu"), {"hospitals": 3, "agreements": [1, 0]}, "data", frozenset({"rng"}))


def test_synthetic_icu_has_the_hospitals_and_features_asked_for():
    pool = synthetic_icu(hospitals=4, test_hospitals=2, patients=100, causal=3, spurious=2, noise=1, rng=rng())
    assert pool.train.image.shape[1:] == (6,)
    assert pool.train.image.dtype == torch.float32
    assert pool.train.fields["environment"].unique().tolist() == [0, 1, 2, 3]
    assert pool.test.fields["environment"].unique().tolist() == [4, 5]
    assert torch.bincount(pool.validation.fields["environment"]).tolist() == pytest.approx([30] * 4, abs=1)


def test_synthetic_icu_works_without_spurious_and_noise_features():
    assert synthetic_icu(hospitals=2, spurious=0, noise=0, rng=rng()).train.image.shape[1:] == (10,)


def test_synthetic_deaths_are_rare_and_training_is_balanced():
    pool = synthetic_icu(rng=rng())
    assert 0.10 < pool.test.label.float().mean() < 0.15
    assert 0.10 < pool.validation.label.float().mean() < 0.15
    assert pool.train.label.float().mean() == 0.5


def pull(examples, columns):
    """Mean over features of the difference between the class means."""
    image, label = examples.image[:, columns], examples.label
    return (image[label == 1].mean(0) - image[label == 0].mean(0)).mean().item()


def test_spurious_features_change_sign_over_hospitals_and_reverse_out_of_distribution():
    pool = synthetic_icu(patients=2000, spurious_strength=2.0, rng=rng())
    pulls = [pull(pool.train[pool.train.fields["environment"] == hospital], slice(10, 20)) for hospital in range(20)]
    wanted = 2 * 2.0 / np.sqrt(10) * np.linspace(1.0, -0.4, 20)
    np.testing.assert_allclose(pulls, wanted, atol=0.15)
    assert pull(pool.test, slice(10, 20)) == pytest.approx(-2 * 2.0 / np.sqrt(10), abs=0.1)


def test_noise_features_say_nothing():
    pool = synthetic_icu(patients=2000, rng=rng())
    assert abs(pull(pool.test, slice(20, 40))) < 0.05


def test_the_causal_features_serve_everywhere_and_the_spurious_ones_mislead():
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    pool = synthetic_icu(rng=rng())

    def scores(columns):
        model = LogisticRegression(max_iter=500).fit(pool.train.image[:, columns], pool.train.label)
        return [roc_auc_score(part.label, model.decision_function(part.image[:, columns])) for part in (pool.validation, pool.test)]

    everything, causal = scores(slice(None)), scores(slice(0, 10))
    assert causal[1] == pytest.approx(causal[0], abs=0.03)
    assert everything[1] < everything[0] - 0.05
    assert everything[1] < causal[1] - 0.05


def test_synthetic_icu_is_seeded():
    one, again, other = (synthetic_icu(hospitals=2, rng=rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.train.image, again.train.image)
    assert not torch.equal(one.train.image, other.train.image)


def test_too_few_synthetic_patients_are_refused_with_the_remedy():
    with pytest.raises(DataError, match=r"synthetic-icu: hospital \d+ has 0 of 1 training patients .*; raise patients \(now 2\)"):
        synthetic_icu(patients=2, rng=rng())
