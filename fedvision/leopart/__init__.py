"""Leopart: a vision transformer whose patches cluster into the parts of objects.

Source: Self-Supervised Learning of Object Parts for Semantic Segmentation, arXiv 2204.13101.
"""
