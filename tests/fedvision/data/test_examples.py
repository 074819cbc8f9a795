"""What examples have, and what some of them lack."""

import torch

from fedvision.data.examples import Examples, has

PICTURES = Examples({"image": torch.zeros(3, 1, 2, 2), "depth": torch.ones(3, 1, 2, 2), has("depth"): torch.tensor([True, False, True])})


def test_all_examples_have_what_nothing_is_said_of():
    assert PICTURES.having("image").tolist() == [True, True, True]


def test_some_lack_what_is_said_to_be_missing():
    assert PICTURES.having("depth").tolist() == [True, False, True]


def test_none_has_a_field_that_does_not_exist():
    assert PICTURES.having("semseg").tolist() == [False, False, False]
    said = Examples({"image": torch.zeros(3, 1, 2, 2), has("depth"): torch.ones(3, dtype=torch.bool)})
    assert said.having("depth").tolist() == [False, False, False]


def test_what_a_batch_has_follows_its_examples():
    assert PICTURES[1:].having("depth").tolist() == [False, True]
    assert PICTURES[torch.tensor([1, 1])].having("depth").tolist() == [False, False]
    assert Examples({}).having("image").tolist() == []
