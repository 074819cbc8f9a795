"""The coordinator: Flower's ServerApp, rounds, evaluation, checkpoints and run records."""
