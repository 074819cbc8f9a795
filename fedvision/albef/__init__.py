"""ALBEF's networks and losses: images and words in one vector space, and words that look at images.

Source: Align before Fuse, arXiv 2107.07651.
"""
