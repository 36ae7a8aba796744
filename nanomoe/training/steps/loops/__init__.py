"""What a fused step does between its matrix products, in loops compiled for the processor they run on.

Every loop takes its sums in an order that the compiler chose once, so that equal inputs give equal bytes on one kind of
processor. Plain tensor operations with the same meaning are in `nanomoe.model`.

Shape letters: B windows, T tokens of a window, N = B * T rows, C channels, H heads, D = C / H, F = 4 C, V vocabulary,
P planes of a dropout site.

Loops over rows or heads take the first one and the end, so that threads can share them.
"""
