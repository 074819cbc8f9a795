"""A vocabulary of the silos' words, made without their texts.

Each silo counts in how many of its training examples every word occurs, in all fields of texts, and reports those words only that occur in
at least ``least`` examples, with that number. The server forgets every word that fewer than ``silos`` silos report, adds up the numbers of
the others, and trains the vocabulary on them (``fedvision.wordpiece.trained``).

What never leaves a silo: texts, the order of words, which words occur together, in which example; any word that fewer than ``least`` of its
examples hold, such as most names, and any character that occurs in such words only.

What is revealed: to the server, that a word is frequent in a silo, and in how many of its examples it occurs; to all who see the
vocabulary, that at least ``silos`` silos reported it (or words that have the piece in common), and by the order of the tokens, roughly
which are more frequent. This is a threshold, not differential privacy: a name that ``least`` examples hold is reported, whether those are
of one person or of many.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedvision.data import FederatedData
from fedvision.data.examples import TEXTS, Examples
from fedvision.data.texts import decode_texts
from fedvision.errors import ExperimentError, RunError
from fedvision.files import write_atomically
from fedvision.wordpiece import cleaned_caption, trained, words_of


@dataclass(frozen=True)
class Made:
    """A vocabulary and what it is of.

    Attributes:
        tokens: the vocabulary.
        counts: the words that the server trained it on, and the examples that hold each.
    """

    tokens: tuple[str, ...]
    counts: Mapping[str, int]

    @property
    def cut(self) -> int:
        """How many of the words are no tokens, but cut."""
        return len(self.counts.keys() - set(self.tokens))


def write(data: FederatedData, size: int, least: int, silos: int, out: Path) -> Made:
    """Make a vocabulary and write it: one token a line, or a JSON list, as the ending of ``out`` says.

    Raises:
        RunError: a file that is there already.
        ExperimentError: as ``vocabulary``.
    """
    if out.exists():
        raise RunError(f"{out} is there already; choose another name")
    made = vocabulary(data, size, least, silos)
    lines = json.dumps(made.tokens, indent=0, ensure_ascii=False) if out.suffix == ".json" else "\n".join(made.tokens)
    write_atomically(out, lambda temporary: temporary.write_text(f"{lines}\n", encoding="utf-8"))
    return made


def vocabulary(data: FederatedData, size: int, least: int, silos: int) -> Made:
    """The vocabulary of a federation's training texts.

    Args:
        data: every silo's examples. What is done with each silo's is ``reported``, which a real silo does where its data are.
        size: tokens at most.
        least: a silo reports words that so many of its examples hold.
        silos: words that fewer silos report are forgotten.

    Raises:
        ExperimentError: data without texts, more silos wanted than there are, no word that enough silos report, or too small a ``size``.
    """
    if not any(field in data.train.examples for field in TEXTS):
        have = ", ".join(data.train.examples.fields)
        raise ExperimentError(f"{data.name!r} has no texts, only {have}; name one of {', '.join(TEXTS)} in data.fields, or other data")
    if silos > data.num_clients:
        raise ExperimentError(f"{silos} silos are to report a word, but there are {data.num_clients}; choose at most as many")
    counts = agreed([reported(counted(data.train[client]), least) for client in range(data.num_clients)], silos)
    if not counts:
        fact = f"there is no word that {least} examples hold in each of {silos} silos"
        raise ExperimentError(f"{fact}; ask for fewer examples (--least) or silos (--silos)")
    return Made(trained(counts, size), counts)


def counted(examples: Examples) -> Counter[str]:
    """In how many of a silo's examples each word occurs; this never leaves the silo.

    Words are counted as texts have them and as learners that clean texts read them: ``dog's`` has ``dog``, ``'``, ``s`` and ``dogs``.
    """
    counts: Counter[str] = Counter()
    fields = [decode_texts(examples.fields[field].flatten(1, -2)) for field in TEXTS if field in examples]
    for own in zip(*fields, strict=True):
        counts.update({word for texts in own for text in texts for word in _words(text)})
    return counts


def _words(text: str) -> Iterable[str]:
    return {*words_of(text), *words_of(cleaned_caption(text, words=len(text)))}


def reported(counts: Mapping[str, int], least: int) -> dict[str, int]:
    """What a silo reports: the words that at least so many of its examples hold.

    >>> reported({"ring": 9, "alice": 2}, least=5)
    {'ring': 9}
    """
    return {word: times for word, times in counts.items() if times >= least}


def agreed(reports: Iterable[Mapping[str, int]], silos: int) -> dict[str, int]:
    """What the server keeps: the words that at least so many silos report, and the sums of their numbers; sorted.

    >>> agreed([{"ring": 9, "disk": 5}, {"ring": 7}], silos=2)
    {'ring': 16}
    """
    sums: Counter[str] = Counter()
    silos_with: Counter[str] = Counter()
    for report in reports:
        sums.update(report)
        silos_with.update(report.keys())
    return {word: sums[word] for word in sorted(sums) if silos_with[word] >= silos}
