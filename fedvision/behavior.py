"""How clients behave: some are slow, some drop out, and the server waits only so long; on a virtual clock."""

from dataclasses import dataclass
from math import exp

from fedvision.seeds import numpy_generator
from fedvision.settings import Fraction, NonNegative, Positive


@dataclass(frozen=True, kw_only=True)
class Behavior:
    """What a federation of unequal clients does to training, simulated: seconds are those of a virtual clock.

    A client takes ``latency + bytes / bandwidth`` for a message and for its answer, and in between
    ``examples * seconds_per_example * slowdown``, where examples are those that it pushed through the model, each as often as
    it did. Its slowdown is drawn once, log-normal with median 1, and may be multiplied by ``slow_factor``; ``jitter`` varies it
    from round to round. All of it follows from the experiment's seed: the same clients are late in every run and on every engine.

    Attributes:
        seconds_per_example: of a client of slowdown 1, forwards and backwards.
        slowdown_spread: standard deviation of the logarithm of slowdowns between clients; 0: all alike.
        slow_fraction: share of the clients that are slower by ``slow_factor`` besides.
        slow_factor: how many times slower these are.
        jitter: as ``slowdown_spread``, between one client's rounds.
        bandwidth: bytes a second, each way; arrays only. If not given, transfers take no time.
        latency: seconds that a message takes whatever its size.
        dropout: probability that a client of a round's cohort does not answer in that round.
        deadline: seconds that the server waits for answers to its messages; who is late does not count. If not given, it waits
            for all that have not dropped out.
    """

    seconds_per_example: NonNegative = 0.001
    slowdown_spread: NonNegative = 0.0
    slow_fraction: Fraction = 0.0
    slow_factor: Positive = 10.0
    jitter: NonNegative = 0.0
    bandwidth: Positive | None = None
    latency: NonNegative = 0.0
    dropout: Fraction = 0.0
    deadline: Positive | None = None

    def slowdown(self, seed: int, client: int, server_round: int) -> float:
        """How many times slower than ``seconds_per_example`` a client is in a round."""
        own = numpy_generator(seed, "slowdown", client)
        factor = exp(self.slowdown_spread * own.standard_normal())
        factor *= self.slow_factor if own.random() < self.slow_fraction else 1.0
        if self.jitter:
            factor *= exp(self.jitter * numpy_generator(seed, "jitter", client, server_round).standard_normal())
        return factor

    def drops_out(self, seed: int, client: int, server_round: int) -> bool:
        """Whether a client of the cohort does not answer in a round."""
        return bool(self.dropout) and numpy_generator(seed, "dropout", client, server_round).random() < self.dropout

    def transfer(self, nbytes: int) -> float:
        """Seconds for a message with so many bytes of arrays, one way."""
        return self.latency + (nbytes / self.bandwidth if self.bandwidth else 0.0)
