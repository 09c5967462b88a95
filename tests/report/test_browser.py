"""The page in a real browser: nothing is asked for, nothing complains, everything is there and readable, on a phone
too.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from playwright.sync_api import Error as BrowserError

from compresso.report.html import write_report
from compresso.report.read import read_results
from tests.report.made import SMALLER, dense, number, pruned, records, report_file, report_of, run_folder

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
INSTALLED = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LONG = "a-very-long-model-name-without-any-place-to-break-it-" * 3
CONTRAST = """
() => {
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const colour = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const c = colour(getComputedStyle(node).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.getClientRects().length) continue;
    const style = getComputedStyle(node), inSvg = node.ownerSVGElement !== undefined && node.ownerSVGElement !== null;
    const [a, b] = [luminance(colour(inSvg ? style.fill : style.color)), luminance(behind(node))].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), node.tagName, node.textContent.trim().slice(0, 40)]);
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as program:
        try:
            opened = program.chromium.launch(executable_path=INSTALLED, args=list(FLAGS))
        except BrowserError as error:
            if INSTALLED is None and "Executable doesn't exist" in str(error):
                pytest.skip("chromium: neither it nor google-chrome on PATH, nor playwright's own")
            raise
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one with a long name, a hostile text and a remark; a task table too wide for a phone."""
    folder = tmp_path_factory.mktemp("page")
    tasks = [number(f"task{i}/acc", 0.5, "share", protocol={"shots": 0}, stderr=0.1) for i in range(12)]
    one = run_folder(
        folder / LONG, records(report_of(dense(*tasks), pruned(remark="no speed-up: zeros are stored dense")))
    )
    evil = pruned(
        "<script>document.title = 'owned'</script><img src=x onerror=fetch('http://127.0.0.1:9/')>",
        SMALLER,
        perplexity=11.0,
    )
    two = report_file(folder / "two.json", evil)
    write_report(folder / "report.html", read_results([one, two]))
    return folder / "report.html"


class Opened:
    """A page with what it asked for and complained about."""

    def __init__(self, page: Page, path: Path) -> None:
        self.page, self.requests, self.complaints = page, list[str](), list[str]()
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(path.as_uri())


@pytest.fixture
def opened(browser: Browser, report: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    """The page at (width, colour scheme)."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    yield Opened(context.new_page(), report)
    context.close()


everywhere = pytest.mark.parametrize(
    "opened",
    [(1280, "light"), (1280, "dark"), (375, "light"), (375, "dark")],
    indirect=True,
    ids=lambda at: f"{at[0]}-{at[1]}",
)


@pytest.mark.slow
@everywhere
def test_it_loads_without_a_request_or_a_complaint_and_fits(opened: Opened, report: Path) -> None:
    page = opened.page
    assert opened.requests == [report.as_uri()]
    assert opened.complaints == []
    assert page.title().startswith("compresso: dense, ")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    width = page.viewport_size["width"] if page.viewport_size else 0
    boxes = [drawing.bounding_box() for drawing in page.locator("figure svg").all()]
    assert len(boxes) >= 7
    assert all(
        box and box["width"] > 200 and box["height"] > 50 and box["x"] >= 0 and box["x"] + box["width"] <= width
        for box in boxes
    )
    table = page.get_by_role("region", name="Tasks: accuracy, part 1 of 2")
    assert table.evaluate("node => node.scrollWidth > node.clientWidth")  # it scrolls in itself


@pytest.mark.slow
@everywhere
def test_text_is_readable_on_what_lies_behind_it(opened: Opened) -> None:
    found: list[Any] = opened.page.evaluate(CONTRAST)
    assert len(found) > 100
    assert [one for one in found if one[0] < 4.5] == []
    dark = opened.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    red, green, blue = map(int, re.findall(r"\d+", background)[:3])
    assert (red + green + blue < 150) == dark


@pytest.mark.parametrize("opened", [(1280, "light")], indirect=True)
def test_what_is_slower_is_said_in_red(opened: Opened) -> None:
    shown = opened.page.locator(".remark", has_text="no speed-up: zeros are stored dense")
    assert shown.count() >= 2
    for i in range(shown.count()):
        red, green, blue = map(
            int, re.findall(r"\d+", shown.nth(i).evaluate("node => getComputedStyle(node).color"))[:3]
        )
        assert shown.nth(i).is_visible() and red > 2 * max(green, blue)


@pytest.mark.parametrize("opened", [(1280, "dark")], indirect=True)
def test_paper_is_white_shows_all_and_cuts_nothing_off(opened: Opened) -> None:
    page = opened.page
    page.set_viewport_size({"width": 700, "height": 1000})
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.get_by_text("How each number was made").is_visible()
    assert page.get_by_text("Made on").first.is_visible()  # folded away on a screen
    assert not page.get_by_role("navigation").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.pdf(format="A4").startswith(b"%PDF")
