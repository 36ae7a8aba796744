import pytest

from nanomoe.config import JobConfig
from service.errors import Invalid
from service.schemas import SubmitRequest
from service.settings import Settings
from service.submission import assess

PARENT = {"job_id": "0" * 32, "checkpoint": 100}


def request(**config: object) -> SubmitRequest:
    return SubmitRequest(text="o rato roeu a roupa do rei de roma " * 3, config=JobConfig.model_validate(config | {"init_from": PARENT}))


def test_a_dense_parent_may_grow_into_any_mixture_and_a_warning_says_when_the_first_logits_differ() -> None:
    equal = assess(request(use_moe=True), Settings(), JobConfig())
    assert equal.warnings == []
    assert (equal.new_job(None).parent_id, equal.new_job(None).parent_percent) == ("0" * 32, 100)
    parted = assess(request(use_moe=True, upcycle_noise=0.1), Settings(), JobConfig())
    assert [warning.code for warning in parted.warnings] == ["upcycle_not_equal"]


@pytest.mark.parametrize(
    ("child", "parent", "reason"),
    [
        ({"use_moe": True, "n_experts": 4}, {"use_moe": True}, "n_experts is 4, the parent's 8"),
        ({}, {"use_moe": True}, "a mixture cannot become one MLP"),
        ({"use_moe": True, "n_embd": 64}, {}, "n_embd is 64, the parent's 128"),
    ],
)
def test_weights_that_have_no_place_in_the_model_are_refused_with_the_reason(
    child: dict[str, object], parent: dict[str, object], reason: str
) -> None:
    with pytest.raises(Invalid, match=reason) as refused:
        assess(request(**child), Settings(), JobConfig.model_validate(parent))
    assert refused.value.code == "parent_does_not_fit"
