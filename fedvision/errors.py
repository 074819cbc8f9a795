"""The errors that FedVision raises on purpose: each states the fact, the value given and the remedy."""


class FedVisionError(Exception):
    """Anything that went wrong in a way a user can mend. The command line prints it without a traceback."""


class ExperimentError(FedVisionError):
    """An experiment file, an override or a setting is wrong."""


class DataError(FedVisionError):
    """A data set is missing, malformed, or cannot be split as asked."""


class AggregationError(FedVisionError):
    """The clients' answers cannot be combined."""


class TooFewAnswersError(AggregationError):
    """A round has fewer usable answers than it needs."""


class EngineError(FedVisionError):
    """The engine that carries the messages failed."""


class RunError(FedVisionError):
    """A run cannot start, go on, or be resumed."""
