"""Texts as tensors: several wordings for each example, as UTF-8 bytes padded with zeros."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedvision.errors import DataError


def encode_texts(texts: Sequence[Sequence[str]]) -> Tensor:
    """Texts as uint8 [examples, wordings, bytes of the longest]; examples with fewer wordings end with empty ones.

    Raises:
        DataError: a text that holds a zero byte.

    Example:
        >>> encode_texts([["a cat", "é"]]).tolist()
        [[[97, 32, 99, 97, 116], [195, 169, 0, 0, 0]]]
        >>> decode_texts(encode_texts([["one", "two"], ["three"]]))
        [['one', 'two'], ['three']]
    """
    wordings = max(map(len, texts), default=0)
    flat = [text.encode() for some in texts for text in (*some, *[""] * (wordings - len(some)))]
    spoilt = next((text for text in flat if b"\0" in text), None)
    if spoilt is not None:
        raise DataError(f"the text {spoilt.decode()!r} holds a zero byte, which marks the end of a text; remove it")
    longest = max(map(len, flat), default=0)
    padded = b"".join(text.ljust(longest, b"\0") for text in flat)
    values = np.frombuffer(padded, dtype=np.uint8).reshape(len(texts), wordings, longest)
    return torch.from_numpy(values.copy())


def decode_texts(codes: Tensor) -> list[list[str]]:
    """The texts that ``encode_texts`` made [examples, wordings, bytes] of; empty wordings are left out."""
    rows = codes.cpu().numpy()
    return [[text.decode() for wording in example if (text := wording.tobytes().rstrip(b"\0"))] for example in rows]
