"""Sentences that a picture contradicts, leaves open or entails.

What cannot be seen (heavy, new) is left open of an object that is there, and contradicted of one that is not; and that the circle is
``heavy or red`` is entailed by a red circle, left open by a blue one, and contradicted where there is none. So a sentence that
speaks of what cannot be seen need not be left open: the picture is needed to tell.
"""

from collections.abc import Callable, Sequence
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from fedvision.data.examples import HYPOTHESIS, VERDICT
from fedvision.data.scenes.captions import Thing
from fedvision.data.scenes.shown import Shown, one_of
from fedvision.data.texts import encode_texts

CONTRADICTION, NEUTRAL, ENTAILMENT = 0, 1, 2

SECRETS = ("heavy", "hollow", "new", "old", "warm", "cold", "soft", "fragile")
"""What no picture shows."""

TRIES = 12
"""So many sentences of a verdict are tried before a picture is left with fewer sentences than wanted."""


def hypotheses(seen: Sequence[Shown], number: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Sentences about n pictures: ``hypothesis`` [n, number, length] and ``verdict`` [n, number].

    Every three in a row have the three verdicts, in random order. No picture has the same sentence twice; one for which nothing can be
    said is empty, and its verdict -1.
    """
    said = [_of_one(one, number, rng) for one in seen]
    return {
        HYPOTHESIS: encode_texts([[text for text, _ in some] for some in said]),
        VERDICT: torch.tensor([[verdict for _, verdict in some] for some in said]).reshape(len(seen), number),
    }


def _of_one(seen: Shown, number: int, rng: np.random.Generator) -> list[tuple[str, int]]:
    verdicts = [verdict for _ in range(0, number, 3) for verdict in rng.permutation(3).tolist()][:number]
    said: dict[str, int] = {}
    for verdict in verdicts:
        kinds = repeat(KINDS[verdict], TRIES)
        text = next((text for some in kinds if (text := one_of(some, rng)(seen, verdict, rng)) and text not in said), None)
        said.update({} if text is None else {text: verdict})
    return [*said.items(), *[("", -1)] * (number - len(said))]


# ---- kinds ----------------------------------------------------------------------------------------------------------

QUALITIES = ("color", "texture", "size")


def _seen(seen: Shown, verdict: int, rng: np.random.Generator) -> str | None:
    """The star is red."""
    thing, (more, quality) = one_of(seen.things, rng), _said(rng)
    name, value = _there(seen, thing, more), _value(seen, thing, quality, verdict == ENTAILMENT, rng)
    return f"the {name} is {value}" if name and value else None


def _placed(seen: Shown, verdict: int, rng: np.random.Generator) -> str | None:
    """The star is to the left of the circle."""
    pairs = seen.side_by_side()
    if not pairs:
        return None
    (one, other), side = one_of(pairs, rng), one_of(("left", "right"), rng)
    if (side == "left") != (verdict == ENTAILMENT):
        one, other = other, one
    return f"the {seen.named(one)} is to the {side} of the {seen.named(other)}"


def _secret(seen: Shown, verdict: int, rng: np.random.Generator) -> str | None:
    """The star is heavy."""
    more, _ = _said(rng)
    name = _there(seen, one_of(seen.things, rng), more) if verdict == NEUTRAL else _absent(seen, one_of(seen.foils, rng), more)
    return f"the {name} is {one_of(SECRETS, rng)}" if name else None


def _either(seen: Shown, verdict: int, rng: np.random.Generator) -> str | None:
    """The star is heavy or red."""
    more, quality = _said(rng)
    value: str | None
    if verdict == CONTRADICTION:
        name, value = _absent(seen, one_of(seen.foils, rng), more), seen.words(one_of(seen.foils, rng), quality)
    else:
        thing = one_of(seen.things, rng)
        name, value = _there(seen, thing, more), _value(seen, thing, quality, verdict == ENTAILMENT, rng)
    said = [one_of(SECRETS, rng), value][:: one_of((1, -1), rng)]
    return f"the {name} is {said[0]} or {said[1]}" if name and value else None


KINDS: dict[int, tuple[Callable[[Shown, int, np.random.Generator], str | None], ...]] = {
    CONTRADICTION: (_seen, _placed, _secret, _secret, _either, _either),
    NEUTRAL: (_secret, _either, _either),
    ENTAILMENT: (_seen, _placed, _either, _either, _either, _either),
}
"""The kinds of sentences by verdict, each as often as it stands here, so that no kind of sentence gives its verdict away."""


def _said(rng: np.random.Generator) -> tuple[str, str]:
    """What the name of a thing says besides its shape, often nothing, and a quality to be said of it, which is another."""
    quality = one_of(QUALITIES, rng)
    return one_of(("", "", *(name for name in QUALITIES if name != quality)), rng), quality


def _there(seen: Shown, thing: Thing, more: str) -> str | None:
    """Words for a thing, if they fit no other."""
    names = [more, "shape"] if more else ["shape"]
    return seen.words(thing, *names) if len(seen.fitting(**{name: getattr(thing, name) for name in names})) == 1 else None


def _absent(seen: Shown, foil: Thing, more: str) -> str | None:
    """Words for a thing of another picture, if they fit nothing here."""
    names = [more, "shape"] if more else ["shape"]
    return None if seen.fitting(**{name: getattr(foil, name) for name in names}) else seen.words(foil, *names)


def _value(seen: Shown, thing: Thing, quality: str, true: bool, rng: np.random.Generator) -> str | None:
    """A thing's quality, or one that something else has and it has not."""
    like = thing if true else one_of([*seen.things, *seen.foils], rng)
    return seen.words(like, quality) if (getattr(like, quality) == getattr(thing, quality)) == true else None
