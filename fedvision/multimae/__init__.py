"""MultiMAE: masked autoencoding of several modalities of one picture. Networks and mathematics; the learners import them.

Source: Bachmann et al., MultiMAE: Multi-modal Multi-task Masked Autoencoders, arXiv 2204.01678.
"""
