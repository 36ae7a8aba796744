"""What a continuation is sent as."""

from pathlib import Path

import pytest

from nanomoe.config import SamplingConfig
from tests.service.generation.driver import Driver, reference_tokens
from tests.service.tiny_checkpoint import TinyCheckpoint, write_tiny_checkpoint


@pytest.fixture
def tiny(tmp_path: Path) -> TinyCheckpoint:
    return write_tiny_checkpoint(tmp_path / "tiny")


def test_a_stop_string_across_tokens_ends_a_text_and_frees_its_slot(tiny: TinyCheckpoint) -> None:
    text = tiny.tokenizer.decode(reference_tokens(tiny, "Era", 30, SamplingConfig(), seed=1))
    stop = text[9:12]
    driver = Driver()
    request_id = driver.ask(tiny.request("Era", 30, temperature=1.0, seed=1, stop=(stop,)), stream=True)
    driver.finish(request_id)
    assert "".join(chunk.text for chunk in driver.chunks(request_id)) == text[: text.find(stop)]
    assert driver.chunks(request_id)[-1].finish_reason == "stop"
    assert driver.n_continuations == 0


def test_logprobs_name_each_token_and_the_likeliest_in_its_place(tiny: TinyCheckpoint) -> None:
    driver = Driver()
    request_id = driver.ask(tiny.request(max_new_tokens=4, logprobs=2), stream=True)
    driver.finish(request_id)
    for chunk in driver.chunks(request_id):
        assert chunk.logprobs is not None
        for token, logprobs in zip(chunk.tokens, chunk.logprobs, strict=True):
            assert logprobs.chosen == logprobs.likeliest[0], "greedy takes the likeliest"
            assert logprobs.chosen.token == token
            assert logprobs.chosen.text == tiny.tokenizer.decode([token])
            assert logprobs.likeliest[1].logprob <= logprobs.chosen.logprob < 0
