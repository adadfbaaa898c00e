"""Text sources, and the packed batches made of them. Numpy and Grain only."""
