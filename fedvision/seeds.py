"""Random numbers: every generator is derived from a seed and a purpose; there is no global state.

>>> generator(0, "fit", 3, 1).initial_seed() == generator(0, "fit", 3, 1).initial_seed()
True
>>> generator(0, "fit", 3, 1).initial_seed() == generator(0, "fit", 3, 2).initial_seed()
False
"""

import hashlib
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that depends on every part of ``(seed, *purpose)`` and on nothing else."""
    text = repr((int(seed), *(part if isinstance(part, str) else int(part) for part in purpose))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU torch generator for one purpose, e.g. ``generator(seed, "fit", round, partition)``."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


def numpy_generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A NumPy generator for one purpose."""
    return np.random.default_rng(derive(seed, *purpose))


def own_generator(values: torch.Tensor) -> torch.Generator:
    """A generator that depends on these values alone, for evaluating an example alike whatever batch it is in."""
    return generator(0, "evaluation", zlib.crc32(values.cpu().contiguous().numpy().data))


@contextmanager
def global_generators(rng: torch.Generator) -> Iterator[None]:
    """Lend ``rng`` to code that only knows torch's global generators, and put them back afterwards.

    For third-party constructors (timm, ``torch.nn``) and layers (dropout) that take no generator. The generators are
    set one by one because ``torch.manual_seed`` costs half a millisecond in looking for kinds of device.
    """
    generators = [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())]
    states = [lent.get_state() for lent in generators]
    seed = int(torch.randint(2**62, (), generator=rng, device="cpu"))
    try:
        for lent in generators:
            lent.manual_seed(seed)
        yield
    finally:
        for lent, state in zip(generators, states, strict=True):
            lent.set_state(state)


@contextmanager
def python_generator(seed: int, *purpose: str | int) -> Iterator[None]:
    """Lend a derived seed to code that only knows Python's global generator, and put that back afterwards."""
    before = random.getstate()
    random.seed(derive(seed, *purpose))
    try:
        yield
    finally:
        random.setstate(before)


@contextmanager
def legacy_generators(seed: int) -> Iterator[None]:
    """Lend a seed to code that only knows the global generators of Python and NumPy, and put both back afterwards.

    For third-party augmentations (timm). NumPy's is seeded as ``numpy.random.seed`` does.

    Args:
        seed: in [0, 2**32).
    """
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
