"""A silo: Flower's ClientApp, local work, and what a client keeps between rounds."""
