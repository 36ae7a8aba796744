"""What is measured of a checkpoint, and what its predictions are explained by."""
