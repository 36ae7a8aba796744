"""Reports: what is drawn, in which words, and what a name cannot do."""

import json
import re

from service.http.schemas import ComparedSeries, Comparison
from service.report.comparison import comparison, document
from service.report.words import WORDS
from tests.service.report.test_curve import envelope


def compared(*values: dict[str, object], name: str | None = None) -> Comparison:
    """Jobs 0, 1, ... that have ended with a loss of their number, and differ in what is given."""
    names = list(values[0])
    jobs = [
        {
            "job_id": str(number),
            "name": name,
            "status": "succeeded",
            "values": value,
            "quarters": [{"percent": 100, "step": 4, "metrics": {"loss": float(number), "val_loss": None}}],
        }
        for number, value in enumerate(values)
    ]
    groups = [{"values": value, "job_ids": [str(number)], "quarters": []} for number, value in enumerate(values)]
    parameters = [
        {"name": one, "values": list({str(value[one]): value[one] for value in values}.values())} for one in names
    ]
    return Comparison.model_validate(
        {"parameters": parameters, "metrics": ["loss", "val_loss"], "jobs": jobs, "groups": groups, "best": None}
    )


def test_the_figure_over_a_parameter_has_a_line_for_each_value_of_the_second() -> None:
    found = compared({"lr": 0.1, "k": 1}, {"lr": 0.1, "k": 2}, {"lr": 0.01, "k": 1}, {"lr": 0.01, "k": 2})
    html = comparison(found, [])
    assert html.count("<polyline") == 2
    assert html.index(">0.01</text>") < html.index(">0.1</text>")
    assert "</span> k 1</span>" in html
    assert "val_loss" not in html  # nobody has it


def test_a_job_has_the_same_colour_in_the_curves_and_in_the_tables_though_another_has_no_steps() -> None:
    found = compared({"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3})
    html = comparison(found, [envelope("2", 1, 2, [1, 2], [3, 4])])
    (colour,) = re.findall(r'stroke="(#\w+)" stroke-width="2"><title>lr 0.3<', html)
    assert re.search(rf"background:{colour}\"></span> 0.3</td>", html)
    assert f'background:{colour}"></span>lr 0.3<' in html.replace("</span> ", "</span>")


def test_a_file_holds_its_data_and_no_script_of_a_name() -> None:
    found = compared({"lr": 0.1}, {"lr": 0.2}, name="</script><script>alert(1)</script>")
    series = ComparedSeries(jobs=[envelope("0", 1, 2, [1, 2], [3, 4]), envelope("1", 1, 1, [1], [3])])
    html = document(found, series, title="<i>&", language="pt")
    assert html.count("<script") == html.count("</script") == 1
    assert "<h1>&lt;i&gt;&amp;</h1>" in html
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", html)  # nothing is fetched
    data = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    assert ComparedSeries.model_validate(data["series"]) == series
    assert Comparison.model_validate(data["comparison"]) == found


def test_a_report_is_said_in_each_language() -> None:
    assert {frozenset(texts) for texts in WORDS.values()} == {frozenset(("en", "pt"))}
