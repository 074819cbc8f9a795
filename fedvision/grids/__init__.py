"""Grids: who carries the messages between the server and the clients."""
