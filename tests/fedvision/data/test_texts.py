"""Texts as padded bytes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedvision.data.texts import decode_texts, encode_texts
from fedvision.errors import DataError

text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=8)


@given(st.lists(st.lists(text, max_size=4), max_size=5))
def test_texts_come_back_as_they_were(texts):
    codes = encode_texts(texts)
    assert codes.dtype == torch.uint8
    assert codes.shape[:2] == (len(texts), max(map(len, texts), default=0))
    assert decode_texts(codes) == texts


def test_a_text_with_a_zero_byte_is_refused():
    with pytest.raises(DataError, match="holds a zero byte"):
        encode_texts([["a\0b"]])
