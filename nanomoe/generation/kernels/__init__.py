"""The innermost loops of generation on a CPU, compiled for the processor they run on; plain tensor operations stand
beside each.

numba compiles them at their first call on a kind of processor and keeps the result beside the source, or in
`NUMBA_CACHE_DIR`. Importing numba takes a third of a second, so only an engine that will serve many tokens does. This
package imports nothing of the rest of generation: what its own files hold is all that a compiled loop depends on.
"""
