"""Ways of doing an optimizer step: `eager`, operator by operator with autograd, which is the reference for every other;
`fused`, written out for a CPU; `captured`, the operators of `eager` as CUDA graphs on a GPU; `triton`, captured with
kernels of our own."""
