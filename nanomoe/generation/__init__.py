"""Continuing token sequences of one checkpoint: how a step is computed (`decoder`), how the next token is chosen
(`output_layer`, `sampling`), and who is continued when (`engine`)."""
