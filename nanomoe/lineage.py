"""Which weights a model may start from: what must agree with the parent's config, and what growing it changes.

Knows configs only; `nanomoe.model.upcycle` moves the weights. Loads no torch.
"""

from nanomoe.config import ConfigWarning, InitFrom, ModelConfig
from nanomoe.errors import NanomoeError

_MUST_AGREE = ("tokenizer", "n_layer", "n_head", "n_embd", "bias")
_MUST_AGREE_OF_MIXTURES = ("moe_stride", "n_experts", "n_shared_experts", "expert_hidden_ratio")


class ParentUnusable(NanomoeError):
    """The checkpoint that a job should start from is not there, or is damaged."""

    code = "parent_unusable"

    def __init__(self, parent: InitFrom, reason: object) -> None:
        super().__init__(f"cannot start from {parent.job_id}@{parent.checkpoint}: {reason}")


def misfits(child: ModelConfig, parent: ModelConfig) -> list[str]:
    """Why the parent's weights have no place in the child, one reason each; empty when they fit.

    A dense parent may grow into a mixture of any shape. A mixture stays what it is: its experts have learned to share
    the work among so many, and a router over other experts would have to learn anew. Settings that shape no weight
    (k, router_score, balance losses, dropout, ...) may differ, and a shorter context leaves the last positions out.
    """
    if parent.use_moe and not child.use_moe:
        return ["use_moe is false, the parent's true: a mixture cannot become one MLP"]
    names = _MUST_AGREE + (_MUST_AGREE_OF_MIXTURES if parent.use_moe else ())
    reasons = [
        f"{name} is {getattr(child, name)!r}, the parent's {getattr(parent, name)!r}"
        for name in names
        if getattr(child, name) != getattr(parent, name)
    ]
    if child.block_size > parent.block_size:
        reasons.append(f"block_size is {child.block_size}, more than the parent's {parent.block_size}")
    return reasons


def warnings(child: ModelConfig, parent: ModelConfig) -> list[ConfigWarning]:
    """What a child that fits should know of its start."""
    found = [] if (grown := upcycle_warning(child, parent)) is None else [grown]
    if parent.use_moe and child.upcycle_noise > 0:
        message = "upcycle_noise does nothing: the parent is a mixture, so no expert is a copy of an MLP"
        found.append(ConfigWarning(code="upcycle_noise_unused", message=message))
    return found


def upcycle_warning(child: ModelConfig, parent: ModelConfig) -> ConfigWarning | None:
    """Why a mixture grown from a dense parent does not begin with the parent's logits; None when it does.

    It does when every expert answers as the parent's MLP and the gates sum to 1 (Komatsuzaki et al., arXiv 2212.05055).
    """
    if parent.use_moe or not child.use_moe:
        return None
    reasons = []
    if not child.renormalises_gates and (child.n_experts > 1 or child.router_score != "softmax"):
        reasons.append("the gates do not sum to 1")
    if child.expert_hidden % (4 * child.n_embd):
        reasons.append(f"an expert's {child.expert_hidden} hidden channels hold no whole copy of the MLP's")
    if child.upcycle_noise > 0:
        reasons.append(f"upcycle_noise is {child.upcycle_noise:g}")
    if not reasons:
        return None
    return ConfigWarning(
        code="upcycle_not_equal",
        message=f"the first logits differ from the parent's: {'; '.join(reasons)}",
    )
