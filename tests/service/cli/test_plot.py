"""Curves in the terminal: to scale, within its width, in letters where there are no colours."""

import io

from rich.console import Console

from service.cli.plot import COLOURS, plot
from service.report.curve import Curve


def curve(label: str, mean: list[float], first: int = 1) -> Curve:
    return Curve(label, 3, [first + n for n in range(len(mean))], mean, mean, mean)


def drawn(curves: list[Curve], *, width: int = 60, terminal: bool = False) -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), "utf-8")
    console = Console(file=file, width=width, force_terminal=terminal, color_system="truecolor" if terminal else None,
                      legacy_windows=False, _environ={})  # fmt: skip
    return plot(curves, console).plain.splitlines()


def test_letters_go_from_the_first_step_at_the_left_to_the_last_at_the_right() -> None:
    title, *rows, axis, first, second = drawn([curve("lr 1", [5.0, 4.0, 3.0]), curve("lr 2", [5.0, 1.0, 1.0])])
    assert title == "train_loss by step"
    assert (rows[0].split()[0], rows[-1].split()[0]) == ("5", "1")
    assert rows[0].index("b") == 9
    assert len(rows[-1]) == 59
    assert rows[-1].endswith("b")
    assert rows[len(rows) // 2].rstrip().endswith("a")
    assert axis.split() == ["1", "3"]
    assert first.strip() == "a ━━ lr 1, mean of 3 jobs: 3 at step 3"
    assert second.strip().startswith("b ━━ lr 2")


def test_a_wide_range_is_logarithmic_and_a_terminal_gets_dots_within_its_width() -> None:
    for width in (30, 60, 200):
        title, *rows, axis, _ = drawn([curve("lr 1", [100.0, 10.0, 1.0])], width=width, terminal=True)
        assert title == "train_loss by step (logarithmic)"
        assert rows[len(rows) // 2].split()[0] == "10"
        assert all("\u2800" < dot <= "\u28ff" for row in rows for dot in row[9:].strip())
        assert max(map(len, [*rows, axis])) == min(width, 100) - 1
    _, *rows, _, _ = drawn([curve("lr 1", [100.0, 10.0, 1.0])], width=61)
    assert rows[len(rows) // 2][9:].strip() == "aaa"  # at the middle of the height half of the way is gone
    assert rows[len(rows) // 2].index("a") == 9 + 24


def test_one_step_equal_losses_and_no_curve_are_drawn_too() -> None:
    assert drawn([]) == drawn([Curve("x", 0, (), ())]) == ["no steps yet"]
    assert sum("a" in row for row in drawn([curve("x", [2.0])])[1:-2]) == 1
    assert sum("a" in row for row in drawn([curve("x", [2.0, 2.0])])[1:-2]) == 1


def test_a_bucket_without_a_loss_is_a_gap_and_the_last_loss_is_named() -> None:
    curve = Curve("x", 1, [1, 2, 3, 4], [2.0, None, 2.0, None])
    _, *rows, _, legend = drawn([curve])
    assert sum(row[9:].count("a") for row in rows) == 2
    assert legend.endswith("2 at step 3")


def test_more_curves_than_colours_are_counted_not_hidden() -> None:
    assert drawn([curve(f"x {n}", [2.0, 1.0]) for n in range(len(COLOURS) + 3)])[-1].strip() == "3 more are not drawn"


def test_a_label_cannot_control_the_terminal() -> None:
    assert "\x1b" not in "".join(drawn([curve("a\x1b[2J", [1.0])]))
