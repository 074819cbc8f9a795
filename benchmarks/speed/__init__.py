"""How fast: our engines against a plain PyTorch loop and Flower's simulation, on the same mathematics.

``python -m benchmarks.speed`` measures everything and writes a report. Each method runs in a process of its own (`child`),
which its parent (`measure`) lets compute turn by turn; ``jobs`` says what is computed, ``methods`` by whom.
"""
