"""The alignment objective: pooling, spaces, losses, retrieval metrics, the layer scan."""
