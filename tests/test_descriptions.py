"""The rule for descriptions sees those that do not stand alone."""

import pytest

from tests.descriptions import stands_alone


@pytest.mark.parametrize(
    "text",
    [
        None, "Of its bytes.", "As `submit` does it.", "Both.", "Always this very value.", "The entries of it.",
        "See the other field.", "Its id in the table.", "It is an id.", "They are three numbers.", "The same as above.",
        "When it was recorded.", "How far it has come.", "Bytes.", "Two words.", "An id without a full stop",
    ],
)  # fmt: skip
def test_the_check_sees_a_description_that_does_not(text: str | None) -> None:
    assert not stands_alone(text)


@pytest.mark.parametrize("text", ["Id of the job.", "SHA-256 of the file, hexadecimal.", "Model id: `JOB_ID@PERCENT`"])
def test_a_description_that_names_what_it_is_about_stands_alone(text: str) -> None:
    assert stands_alone(text)
