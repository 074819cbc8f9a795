"""Data sets, and how they are dealt to clients."""

from fedvision.data.examples import Examples
from fedvision.data.federated import FederatedData, Silos, Spec
from fedvision.data.pool import Pool

__all__ = ["Examples", "FederatedData", "Pool", "Silos", "Spec"]
