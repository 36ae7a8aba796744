"""The model: nanoGPT's block, the same with a mixture of experts, and what they cost. Knows no training.

`gpt.py` and `moe.py` define the block and the router. The same arithmetic stands in other forms elsewhere:
docs/architecture.md, "To change the model's block", lists each with its reason and the test that compares it.

Dropout masks are counted for each block in `gpt.Block`: a sublayer that drops out needs its share there.
"""
