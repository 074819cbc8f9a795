"""A plain Flower app that borrows one strategy from FedVision."""
