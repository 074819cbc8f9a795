import numpy as np
import pytest

from fedvision.errors import DataError
from fedvision.gallery import Gallery

PICTURE = np.zeros((4, 5, 3), np.uint8)


def test_places_may_be_empty_and_pictures_of_different_sizes():
    shown = Gallery(["a", "b"], ["x", "y"], [[PICTURE, None], [PICTURE[:2], PICTURE[:, :1]]])
    assert shown.caption == ""


@pytest.mark.parametrize(
    ("rows", "columns", "pictures"),
    [(["a"], ["x", "y"], [[PICTURE]]), (["a", "b"], ["x"], [[PICTURE]]), ([], ["x"], []), (["a"], [], [[]])],
    ids=["a short row", "a row too few", "no rows", "no columns"],
)
def test_there_is_a_place_for_every_row_and_column(rows, columns, pictures):
    with pytest.raises(DataError, match="give one a column in each row"):
        Gallery(rows, columns, pictures)


@pytest.mark.parametrize("notes", [[["one"]], [["one", "two"]] * 2, [[]]], ids=["a short row", "a row too many", "empty"])
def test_there_is_a_note_for_every_picture_or_none_at_all(notes):
    assert Gallery(["a"], ["x", "y"], [[PICTURE, None]], notes=[["", "one"]]).notes == [["", "one"]]
    with pytest.raises(DataError, match=r"has rows of .* notes; give one a column in each row, at least one of each, an empty one where"):
        Gallery(["a"], ["x", "y"], [[PICTURE, None]], notes=notes)


@pytest.mark.parametrize(
    ("picture", "kind"),
    [
        (PICTURE.astype(np.float32), r"float32 \[4, 5, 3\]"),
        (PICTURE[..., 0], r"uint8 \[4, 5\]"),
        (PICTURE.transpose(2, 0, 1), r"uint8 \[3, 4, 5\]"),
        (PICTURE[:0], r"uint8 \[0, 5, 3\]"),
        ([[0]], "list"),
    ],
    ids=["float", "gray", "channels first", "empty", "list"],
)
def test_pictures_are_bytes_in_color(picture, kind):
    with pytest.raises(DataError, match=f"the picture at 'a', 'x' of a gallery is {kind}, expected uint8"):
        Gallery(["a"], ["x"], [[picture]])
