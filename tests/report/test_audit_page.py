"""The page of an audit shows all that the audit says, loads nothing, and obeys no text of the data."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest

from pertoken.report.audit import audit_page
from pertoken.report.visible import drawn_text

VOID = {"meta", "link", "br", "hr", "img", "input"}
SHAPES = {"rect", "line"}  # which may close themselves within an SVG
HOSTILE = [
    "<script>alert(1)</script>",
    "</style></script><img src=x onerror=alert(1)>",
    "\" onmouseover='alert(1)' x=\"",
    "{{ 7 * 7 }}{% raw %}&lt;&amp;",
    "a\x00b\x1b[31mc\x7f\x9b",
    "\u202etxt.exe\u202c\u2066\u200b\ufeff\u200e",
    "two\nlines\tand\rmore",
    "lone \ud800 surrogate",
]


class Page(HTMLParser):
    """Elements, attributes and text of a page; what is not balanced fails."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}  # by innermost element
        self.all_text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SHAPES
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)
        if not {"script", "style"} & set(self.open):
            self.all_text.append(data)

    @property
    def text(self) -> str:
        return "".join(self.all_text)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def a_file(name: str, **changed: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(("skipped", "overlong", "truncated", "unsupervised", "too_short"), 0)
    sizes = {"rows": 12, "samples": 10, "tokens": 400, "num_tokens": 100}
    return {"file": name, "kind": "JSON lines", "source": None, "repeat": 1, **numbers, **sizes, **changed}


def a_part(name: str, files: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "part": name,
        "files": files,
        "formats": {"messages": 9, "alpaca": 3},
        "rows": 1234,
        "samples": 1200,
        "tokens": 4000,
        "num_tokens": 1000,
        "lengths": {"edges": [0, 64, 128, 192], "counts": [5, 700, 95]},
    }


@pytest.fixture
def audit() -> dict[str, Any]:
    return {
        "format_version": 1,
        "recipe": "recipes/chat.toml",
        "stage": "sft",
        "tokenizer": "a-tokenizer",
        "max_seq_len": 192,
        "parts": [
            a_part("train", [a_file("a.jsonl"), a_file("b.jsonl", unsupervised=2, source="chats")]),
            a_part("eval", [a_file("held-out.jsonl")]),
        ],
        "plan": {
            "batch_size": 16,
            "steps_per_epoch": 75,
            "total_steps": 150,
            "epochs": 2,
            "padding_share": 0.125,
            "micro_batches": 1,
        },
        "estimate": {
            "parameters": 1_000_000,
            "memory_bytes": {"weights": 2**22, "gradients": 2**22, "optimizer": 2**23, "activations": 2**20},
            "memory_total_bytes": 17 * 2**20,
            "memory_available_bytes": 2**30,
            "seconds": 90.0,
            "how": "computed from the recipe; not measured",
        },
        "problems": [
            {
                "kind": "unsupervised",
                "harms": True,
                "what": "2 rows would not be trained",
                "count": 2,
                "places": [f"b.jsonl:{n}" for n in range(20)],
            },
            {"kind": "repeated", "harms": False, "what": "31 rows are repeated", "count": 31, "places": []},
        ],
        "examples": [
            {"source": "a.jsonl:1", "why": "first sample", "pieces": [["user: hi\n", False], ["hello", True]]}
        ],
        "remarks": ["data.path=chats: files passed over: notes.pdf"],
        "ok": False,
    }


def test_the_page_says_all_that_the_audit_says(audit: dict[str, Any]) -> None:
    page = Page(audit_page(audit))
    for problem in audit["problems"]:
        for said in (problem["what"], problem["kind"], *problem["places"]):
            assert said in page.text
    for part in audit["parts"]:
        for file in part["files"]:
            assert file["file"] in page.text
        assert set(part["formats"]) <= set(page.texts["bdi"])
    assert audit["remarks"][0] in page.text
    assert "2 samples would be lost or trained wrongly" in page.text
    for figure in ("1,234", "4,000", "25%", "12.5%", "17.0 MiB", "1.0 GiB", "2 min", "1,000,000"):
        assert figure in page.text, figure


def test_only_harmless_problems_are_no_loss(audit: dict[str, Any]) -> None:
    audit["ok"], audit["problems"] = True, audit["problems"][1:]
    text = Page(audit_page(audit)).text
    assert "Nothing would be lost or trained wrongly" in text
    assert "would be lost or trained wrongly" not in text.replace("Nothing would be lost or trained wrongly", "")


def test_supervised_text_alone_is_marked(audit: dict[str, Any]) -> None:
    html = audit_page(audit)
    sample = html[html.index('class="tokens"') :]
    sample = sample[: sample.index("</p>")]
    assert re.findall(r"<mark>.*?<bdi>(.*?)</bdi>.*?</mark>", sample) == ["hello"]
    assert '<bdi>user: hi<i class="ctl">↵\n</i></bdi>' in sample


def test_special_tokens_stay_whole_within_right_to_left_text(audit: dict[str, Any]) -> None:
    audit["examples"][0]["pieces"] = [["متى تصل؟<|im_end|>", True]]
    assert '<bdi>متى تصل؟<bdi dir="ltr">&lt;|im_end|&gt;</bdi></bdi>' in audit_page(audit)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_changes_nothing_else(audit: dict[str, Any], text: str) -> None:
    def with_text(value: str) -> Page:
        changed = copy.deepcopy(audit)
        train = changed["parts"][0]
        changed.update(recipe=value, tokenizer=value)
        changed["estimate"]["how"] = value
        train["files"][0].update(file=value, kind=value, source=value)
        changed["remarks"] = [value]
        train["formats"] = {value: 9}
        changed["problems"][0].update(kind=value, what=value, places=[value])
        changed["examples"] = [{"source": value, "why": value, "pieces": [[value, False], [value, True]]}]
        html = audit_page(changed)
        html.encode()  # a lone surrogate could not be written
        return Page(html)

    tame, page = with_text("tame"), with_text(text)
    drop = {"i"}  # which marks what is drawn
    assert [tag for tag, _ in page.elements if tag not in drop] == [tag for tag, _ in tame.elements if tag not in drop]
    for (tag, one), (_, other) in zip(
        [e for e in page.elements if e[0] not in drop], [e for e in tame.elements if e[0] not in drop], strict=True
    ):
        assert one.keys() == other.keys(), tag
    assert page.texts["script"] == tame.texts["script"]
    assert page.texts["style"] == tame.texts["style"]
    assert page.text.count(drawn_text(text)) + page.text.count(drawn_text(text, lines=True)) >= 12
    assert not [c for c in page.text if not c.isprintable() and c != "\n"]


def test_only_joiners_between_letters_that_need_them_stay_unseen() -> None:
    assert drawn_text("👩\u200d🚀 می\u200cخواهم") == "👩\u200d🚀 می\u200cخواهم"
    assert drawn_text("pass\u200dword") == "pass⟨U+200D⟩word"


def test_the_page_loads_nothing(audit: dict[str, Any]) -> None:
    html = audit_page(audit)
    page = Page(html)
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert not [tag for tag, _ in page.elements if tag in ("img", "iframe", "object", "embed", "base", "form")]
    assert [attributes.get("href") for attributes in page.of("link")] == ["data:,"]
    assert all("src" not in attributes for attributes in page.of("script"))
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_a_reader_without_eyes_finds_the_way(audit: dict[str, Any]) -> None:
    page = Page(audit_page(audit))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert all(attributes.get("scope") for attributes in page.of("th"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name in ("aria-labelledby", "href"):
            for target in (attributes.get(name) or "").split():
                assert (name == "href" and not target.startswith("#")) or target.removeprefix("#") in ids


def test_one_part_keeps_the_order_of_headings(audit: dict[str, Any]) -> None:
    audit["parts"] = audit["parts"][:1]
    test_a_reader_without_eyes_finds_the_way(audit)


def test_what_is_empty_or_unknown_is_a_page_too(audit: dict[str, Any]) -> None:
    part: dict[str, Any] = dict.fromkeys(("rows", "samples", "tokens", "num_tokens"), 0)
    part = {
        "part": "train",
        "files": [],
        "formats": {},
        "lengths": {"edges": [], "counts": []},
        **part,
    }
    audit.update(tokenizer=None, parts=[part], problems=[], examples=[], plan=dict.fromkeys(audit["plan"]))
    audit["estimate"] = dict.fromkeys(audit["estimate"]) | {"how": "unknown"}
    assert "None found." in Page(audit_page(audit)).text
    audit.update(plan=None, estimate=None, parts=[])
    Page(audit_page(audit))


def test_counts_of_weights_are_shown_as_they_are(audit: dict[str, Any]) -> None:
    audit["parts"][0]["num_tokens"] = 1000.5
    assert "1,000.5 tokens" in Page(audit_page(audit)).text


def test_a_page_stays_small_and_says_what_it_leaves_out(audit: dict[str, Any]) -> None:
    files = [a_file(f"folder/part-{n:05}.jsonl") for n in range(10_000)]
    files[9_876].update(skipped=3)
    audit["parts"][0]["files"] = files
    audit["examples"][0]["pieces"] = [["x" * 3_000_000, False], ["y" * 3_000_000, True]]
    audit["problems"][0]["what"] = "z" * 1_000_000
    audit["problems"] += [audit["problems"][1]] * 4998
    html = audit_page(audit)
    assert len(html.encode()) < 500_000
    text = Page(html).text
    assert "10,000 files" in text
    assert "the first 500 are shown" in text
    assert text.index("part-09876") < text.index("part-00000")
    assert "The first 200 of 5,000 are shown" in text
    assert "2,996,000 characters not shown" in text


def test_memory_that_is_not_there_is_said(audit: dict[str, Any]) -> None:
    assert "More than is available" not in Page(audit_page(audit)).text
    audit["estimate"]["memory_available_bytes"] = 2**20
    assert "More than is available" in Page(audit_page(audit)).text


def test_another_version_is_refused(audit: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="format_version=2"):
        audit_page(audit | {"format_version": 2})
