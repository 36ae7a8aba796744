"""The model: nanoGPT's block, the same with a mixture of experts, and what they cost. Knows no training.

`gpt.py` and `moe.py` define the block and the router; training and evaluation run them. A change of the architecture
must follow in each other form. Each stands for a reason, and a test compares it:

nanomoe/generation/decoder.py          one position at a time with cached keys and values, no dropout and no losses
    tests/nanomoe/generation/test_engine.py: texts equal those of the whole window through `GPT` in float64
nanomoe/generation/kernels/step.py     the decoder's step as compiled loops: for a small model, tensor operations cost
                                       more than the arithmetic
    tests/nanomoe/generation/test_kernels.py: a step equals the decoder's
nanomoe/assets/modeling_nanomoe.py     a mixture that transformers opens where nanomoe is not installed
    tests/nanomoe/test_export.py: logits of the exported folder, opened by another process
nanomoe/export.py                      a dense model under the names of transformers' GPT-2
    tests/nanomoe/model/test_gpt.py: logits, gradients and 50 steps
nanomoe/evaluation/attention.py        attention weights, which the fused attention keeps to itself
    tests/nanomoe/evaluation/test_attention.py: weights equal those of transformers' GPT-2
nanomoe/model/upcycle.py               names and shapes of a dense block's weights in a mixture
    tests/nanomoe/model/test_upcycle.py: first logits equal the parent's
nanomoe/model/size.py                  parameters, memory and operations before anything is built
    tests/nanomoe/model/test_gpt.py: the parameters of a built model
tests/nanomoe/model/moe_reference.py   the mixture as loops over tokens and experts, to read beside the paper
    tests/nanomoe/model/test_moe.py: every option, in float64

Dropout masks are counted for each block in `gpt.Block`: a sublayer that drops out needs its share there.
"""
