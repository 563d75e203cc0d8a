"""The page and the text of a report: complete, self-contained, inert, and never a fault; also in a real browser."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from palate.diagnosis import report
from palate.settings import PalateError

CHROMIUM = Path("/usr/bin/chromium")
ASSETS = {"src", "srcset", "href", "xlink:href", "action", "data", "poster", "background"}


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.ids, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data):
        self.words.append(data)


def written(folder):
    html, text = report.write(folder)
    assert (html, text) == (folder / "report.html", folder / "report.md")
    return html.read_text(), text.read_text()


def test_the_page_answers_the_questions_of_a_run(write_run):
    page, _ = written(write_run())
    words = " ".join(Page(page).words)
    for expected in (
        "It got better.", "Key numbers", "Facts covered", "Proxy and gold against KL", "Calibration", "Length bias",
        "ceiling of the labels", "Before and after", "Value: explained variance", "Clipped share", "Commit",
        "stages.1.algorithm.kl_coef: 0.05", "3 of 6,000 rows were longer",
    ):  # fmt: skip
        assert expected in words


def test_the_page_asks_for_nothing_outside_itself(write_run):
    page, _ = written(write_run())
    found = Page(page)
    assert "script" not in found.tags
    assert "iframe" not in found.tags
    assets = {value for _, name, value in found.attributes if name in ASSETS}
    assert all(value.startswith("#") or value == "data:," for value in assets)
    assert not re.search(r"@import|url\(", page)
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert "default-src 'none'" in page


def test_links_inside_the_page_lead_somewhere_and_ids_are_unique(write_run):
    found = Page(written(write_run())[0])
    assert len(found.ids) == len(set(found.ids))
    targets = {value[1:] for _, name, value in found.attributes if name == "href" and value.startswith("#")}
    assert targets <= set(found.ids)


def test_what_models_say_is_text_in_the_page_and_in_the_markdown(write_run):
    page, text = written(write_run())
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;document.title" in page
    hostile = [line for line in text.splitlines() if "<script>" in line]
    assert hostile
    assert all(line.startswith("    ") for line in hostile)


def test_every_drawing_has_a_name_for_those_who_cannot_see_it(write_run):
    page, _ = written(write_run())
    drawings = re.findall(r"<svg[^>]*>", page)
    assert len(drawings) > 20
    assert all('role="img"' in d and re.search(r'aria-label="[^"]+"', d) for d in drawings)


def test_the_markdown_has_verdict_numbers_samples_and_metrics(write_run):
    _, text = written(write_run())
    assert text.startswith("# tasting_room\n\n**It got better.**")
    assert "| measure | sft | ppo |" in text
    assert "| objective/kl |" in text
    assert "## Samples" in text


@pytest.mark.parametrize("stages", [(), ("sft",), ("sft", "reward"), ("sft", "reward", "rlhf"), ("evaluate",)])
def test_any_part_of_a_run_can_be_reported(write_run, stages):
    page, text = written(write_run(stages=stages))
    assert "Verdict" in page
    assert text
    if "evaluate" not in stages and stages:
        assert "no stage left evaluation.json" in page


@pytest.mark.parametrize(
    "name",
    ["run.yaml", "resolved.yaml", "provenance.json", "3-rlhf/metrics.jsonl", "3-rlhf/stage.yaml", "3-rlhf/tokens.jsonl",
     "4-evaluate/evaluation.json", "4-evaluate/samples.jsonl"],
)  # fmt: skip
@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"models": {"a": 3}}', '{"step": "x", "loss": "y"}\n'])
def test_missing_and_broken_files_are_no_fault(write_run, name, content):
    folder = write_run()
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    page, _ = written(folder)
    assert "Warnings and gaps" in page
    if content is None and not name.endswith(("evaluation.json", "samples.jsonl")):
        assert f"{Path(name).name} is not there" in page


def test_text_without_a_utf8_form_does_not_stop_the_report(write_run):
    folder = write_run()
    row = {"prompt": "p", "completions": {"a": "half a \ud83d letter"}}
    (folder / "4-evaluate" / "samples.jsonl").write_text(json.dumps(row) + "\n")
    assert "half a ? letter" in written(folder)[0]


def test_a_run_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(PalateError, match="absent: there is no such run directory"):
        report.write(tmp_path / "absent")


@pytest.fixture
def browser():
    if not CHROMIUM.exists():
        pytest.skip("no browser at /usr/bin/chromium: the page is not opened in one")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    quiet = ("background-networking", "component-update", "sync", "quic", "gpu")
    arguments = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=str(CHROMIUM), args=arguments)
        yield opened
        opened.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_real_browser_shows_it_without_errors_requests_or_scripts(write_run, browser):
    folder = write_run(hacked=True)
    report.write(folder)
    for width, scheme in ((1280, "light"), (360, "dark")):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        said, asked = [], []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda fault, said=said: said.append(str(fault)))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(folder.joinpath("report.html").as_uri())
        assert said == []
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        assert page.title() == "tasting_room · palate report"
        assert page.locator("script").count() == 0
        assert page.locator("blockquote", has_text="<script>document.title").count() == 1
        assert page.locator("h2", has_text="The proxy was over-optimised.").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("svg.chart").first.bounding_box()["width"] > 250
        page.close()
