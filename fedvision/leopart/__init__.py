"""Leopart: features of parts of objects, learned by clustering patches, and what they are judged by.

Source: Self-Supervised Learning of Object Parts for Semantic Segmentation, arXiv 2204.13101.
"""
