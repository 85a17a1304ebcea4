"""The page shows all of a report, runs nothing and fetches nothing, whatever a model has written."""

from __future__ import annotations

import re
from copy import deepcopy
from html.parser import HTMLParser

import pytest
from reports import HOSTILE, parsed, report_of

from lit_distill.report.page import render_page


@pytest.fixture(scope="module")
def page() -> str:
    return render_page(
        [report_of(HOSTILE, 1, trained=False), *(report_of(HOSTILE, seed) for seed in (1, 2)), report_of("other")]
    )


class Tags(HTMLParser):
    """Every tag and attribute of a page, and what is not closed."""

    VOID = frozenset({"meta"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.texts.append(data)


def test_the_page_holds_no_script_and_no_address(page) -> None:
    tags = Tags(page)
    assert not {"script", "img", "link", "iframe", "object", "embed", "form", "base"} & set(tags.tags)
    for name, value in tags.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "data", "action", "xlink:href"):
            assert value.startswith("#")
    styles = page.split("<style>")[1].split("</style>")[0]
    assert not re.findall(r"url\(|@import|https?:", styles)


def test_the_pages_tags_are_all_closed(page) -> None:
    assert not Tags(page).open


@pytest.mark.slow
def test_the_same_reports_give_the_same_page() -> None:
    report = report_of()
    assert render_page([report]) == render_page([deepcopy(report)])


def test_hostile_text_is_shown_as_it_is(page) -> None:
    shown = "".join(Tags(page).texts)
    assert '</p><script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(1)>' in shown
    assert "\u202e" not in page
    assert "\x00" not in page
    page.encode("utf-8")


def test_every_anchor_of_the_page_has_its_section(page) -> None:
    attributes = Tags(page).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    linked = {value[1:] for name, value in attributes if name == "href"}
    anchors = set(re.findall(r'<h2 id="([^"]+)"', page))
    assert anchors <= linked <= set(ids)
    assert {
        "metrics",
        "calibration",
        "exposure-bias",
        "lengths",
        "judge",
        "training",
        "samples",
        "more",
        "reproduce",
    } == anchors - {"settings"}


def test_every_drawing_is_xml_that_says_what_it_shows_and_has_finite_places(page) -> None:
    drawings = re.findall(r"<figure>.*?(<svg.*?</svg>)", page, flags=re.DOTALL)
    assert len(drawings) > 15
    for text in drawings:
        root = parsed(text)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        _, _, width, height = map(float, root.get("viewBox").split())
        assert width > 0
        assert height > 0
        for element in root.iter():
            for name, value in element.attrib.items():
                assert not re.search(r"\b(nan|inf)\b", value) or name == "aria-label"


@pytest.mark.slow
def test_what_a_drawing_says_has_the_numbers_of_the_record() -> None:
    said = [value for name, value in Tags(render_page([report_of()])).attributes if name == "aria-label"]
    assert any("confidence 0.90: 75% right, 12 predictions" in text for text in said)
    assert any("student, step 100: 3 at 1 to 2 at 3" in text for text in said)  # the training's loss
    assert any("10 at 2 to 12.5 at 3" in text for text in said)  # ExAccErr, without its first, which is not a number
    assert any("under 4 words, student, step 100: 50.0" in text for text in said)


@pytest.mark.slow
def test_over_seeds_the_predictions_of_a_student_add_up_and_those_of_its_teacher_do_not() -> None:
    reports = [report_of(seed=seed) for seed in (1, 2)]
    reports[1]["metrics"]["teacher_perplexity"] = 2.1  # both tests of the teacher count in its column
    tags = Tags(render_page(reports))
    notes = [text for text in tags.texts if "% right" in text and text.startswith("ECE")]
    assert notes == ["ECE 0.100, 60.0 % right, 16 predictions", "ECE 0.100, 60.0 % right, 32 predictions"] * 2
    said = [value for name, value in tags.attributes if name == "aria-label"]
    assert any("student, step 100, along the teacher's texts: 0 at 1 to 0.8 at 3" in text for text in said)


def test_every_number_of_a_report_stands_on_its_page() -> None:
    report = report_of(perplexity=3.25)
    report["metrics"] |= {
        "exact_match": 12.3,
        "unfinished": 0.4567,
        "teacher_exact_match": 45.6,
        "judge_count": 9,
        "bad": None,
    }
    shown = "".join(Tags(render_page([report])).texts)
    for number in ("3.250", "12.3", "45.7", "45.6", "ECE 0.100, 60.0 % right, 16 predictions", "7.5"):
        assert number in shown
    assert "bad" not in shown


def test_without_a_teacher_there_is_a_page_of_the_student_alone() -> None:
    report = report_of(teacher=None)
    report["metrics"] = {name: value for name, value in report["metrics"].items() if "teacher" not in name}
    report["sections"] = {
        name: [entry for entry in entries if entry.get("role") != "teacher"]
        for name, entries in report["sections"].items()
    }
    page = render_page([report])
    assert re.findall(r'<th scope="col">([^<]*)', page)[:1] == ["student, step 100"]
    assert page.count("<figure>") >= 5


def test_table_heads_say_what_they_head(page) -> None:
    tables = re.findall(r"<table.*?</table>", page, flags=re.DOTALL)
    assert tables
    for table in tables:
        assert "<caption" in table
        assert table.count("<th ") == table.count('scope="')
