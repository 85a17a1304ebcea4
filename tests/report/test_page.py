"""The page shows all of a report, runs nothing and fetches nothing, whatever a model has written."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

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

    VOID = frozenset({"meta", "wbr"})

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
    assert {value[1:] for name, value in attributes if name == "href"} == set(ids)
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
    } <= set(ids)


def test_every_drawing_is_xml_with_a_title_a_description_and_finite_places(page) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) > 20
    for text in drawings:
        root = parsed(text)
        names = [child.tag.rpartition("}")[2] for child in root]
        assert names[:2] == ["title", "desc"]
        assert root[0].text
        assert "nan" not in ET.tostring(root[2], encoding="unicode") if len(root) > 2 else True
        _, _, width, height = map(float, root.get("viewBox").split())
        for element in root.iter():
            for key, limit in (("x", width), ("y", height), ("cx", width), ("cy", height)):
                assert -1 <= float(element.get(key, 0)) <= limit + 1


def test_table_heads_say_what_they_head(page) -> None:
    tables = re.findall(r"<table.*?</table>", page, flags=re.DOTALL)
    assert tables
    for table in tables:
        assert "<caption" in table
        assert table.count("<th ") == table.count('scope="')
