"""The pages about runs in a real browser: Chromium without a window, through selenium."""
import json
import os
import shutil

import pytest

from gpucnn import report
from gpucnn.backend import use_backend
from tests import report_pages as pages

pytest.importorskip("PIL", reason="needs Pillow: pip install 'gpucnn[images]'")
REQUIRED = bool(os.environ.get("GPUCNN_REQUIRE_BROWSER"))
WIDTHS = 360, 1280
# Without a window, and without anything that a browser asks the network for by itself.
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
           "--disable-background-networking", "--disable-component-update", "--disable-sync",
           "--disable-dev-shm-usage")

OVERFLOW = "const e = document.documentElement; return e.scrollWidth - e.clientWidth"
# The least contrast (WCAG 2.2, 1.4.3) of all text that can be seen, and the text that has it.
CONTRAST = """
const canvas = document.createElement("canvas");
canvas.width = canvas.height = 1;
const paint = canvas.getContext("2d", {willReadFrequently: true});
const blend = colours => {
  paint.clearRect(0, 0, 1, 1);
  for (const colour of colours) { paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1); }
  return paint.getImageData(0, 0, 1, 1).data;
};
const luminance = pixel => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
  const c = pixel[i] / 255;
  return sum + weight * (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
}, 0);
let least = {ratio: 99};
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
  const text = texts.currentNode.data.trim(), element = texts.currentNode.parentElement;
  if (!text || !element.checkVisibility() || element.closest("title, .unseen")) continue;
  const grounds = [];
  for (let e = element; e; e = e.parentElement) {
    grounds.unshift(getComputedStyle(e).backgroundColor);
  }
  grounds.unshift("white");
  const style = getComputedStyle(element);
  const ink = element instanceof SVGElement ? style.fill : style.color;
  const both = [blend(grounds), blend([...grounds, ink])].map(luminance);
  const ratio = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
  if (ratio < least.ratio) least = {ratio, text, ink, grounds};
}
return least;
"""


def missing():
    """What stands against a browser, or None."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "needs selenium: pip install 'gpucnn[browser]'"
    if not all(map(shutil.which, ("chromium", "chromedriver"))):
        return "needs chromium and chromedriver: apt install chromium chromium-driver"
    return None


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    why_not = missing()
    if why_not and REQUIRED:
        pytest.fail(f"GPUCNN_REQUIRE_BROWSER is set, but this {why_not}")
    if why_not:
        pytest.skip(why_not)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page of each kind: few classes and grey, many and coloured, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for name, classes, channels in (("grey", 6, 1), ("coloured", 30, 3)):
        (folder / name).mkdir()
        with use_backend("numpy"):
            found[name] = report.write_report(
                folder / name, pages.model(classes, channels), pages.dataset(classes, channels),
                history=pages.history(), metrics=pages.metrics(device="A GPU with a long name"))
    records = [report.RunRecord(
        folder / f"<run> {n} {'x' * 40}", pages.history(3 + n, shift=n / 99),
        pages.metrics(seed=n, model="y" * 50 * n)) for n in range(10)]
    found["comparison"] = report.write_comparison(records, folder / "compare.html")
    return found


def emulate(browser, width, scheme):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {
        "features": [{"name": "prefers-color-scheme", "value": scheme}]})


def requests(browser, page):
    """The addresses that a page has asked for since the last call, but for what is in it."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events
            if event["method"] == "Network.requestWillBeSent"
            and event["params"]["documentURL"] == page]
    return [url for url in urls if not url.startswith("data:")]


@pytest.mark.parametrize("name", ["grey", "coloured", "comparison"])
def test_a_page_in_a_browser(browser, written, name):
    url = written[name].as_uri()
    for scheme in ("light", "dark"):
        for width in WIDTHS:
            emulate(browser, width, scheme)
            browser.get(url)
            browser.execute_script("for (const d of document.querySelectorAll('details')) "
                                   "d.open = true")
            assert requests(browser, url) == [url]
            assert browser.get_log("browser") == []  # a policy that the page broke, too
            assert browser.execute_script(OVERFLOW) == 0, f"{width} pixels wide, {scheme}"
            least = browser.execute_script(CONTRAST)
            assert least["ratio"] >= 4.5, f"{scheme}: {least}"
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    emulate(browser, 1280, "light")
    assert ground != browser.execute_script(
        "return getComputedStyle(document.body).backgroundColor")
    broken = browser.execute_script(
        "return [...document.images].filter(i => !(i.complete && i.naturalWidth)).length")
    assert broken == 0
    headings = browser.execute_script(
        "return [...document.querySelectorAll('h1, h2')].filter(h => h.offsetHeight)"
        ".map(h => h.textContent)")
    if name == "comparison":
        assert headings == ["10 training runs", "Outcomes", "Learning curves",
                            "Settings that differ"]
        return
    assert headings == ["tiny", "Learning curves", "Confusion matrix", "Classes", "Most wrong",
                        "First filters", "Feature maps", "Time and memory"]
    assert browser.execute_script("return document.images.length") > 50


def test_no_legend_or_label_lies_on_another(browser, written):
    """The words in each chart, and the headline figures."""
    for name in ("grey", "comparison"):
        for width in WIDTHS:
            emulate(browser, width, "light")
            browser.get(written[name].as_uri())
            assert browser.execute_script("""
                const clash = (a, b) => a.left < b.right - 1 && b.left < a.right - 1
                    && a.top < b.bottom - 1 && b.top < a.bottom - 1;
                const groups = [...document.querySelectorAll(".chart, .figures")];
                return groups.flatMap(group => {
                    const all = [...group.querySelectorAll("text, li, h3, dd, dt")];
                    return all.flatMap((a, i) => all.slice(i + 1).filter(b => clash(
                        a.getBoundingClientRect(), b.getBoundingClientRect()))
                        .map(b => `${a.textContent} on ${b.textContent}`));
                })""") == []


def test_the_browser_would_show_what_is_wrong(browser, tmp_path):
    """Each check above finds what it looks for."""
    page = tmp_path / "wrong.html"
    page.write_text("""<!doctype html><meta http-equiv="Content-Security-Policy"
        content="default-src 'none'; img-src data: http:"><link rel="icon" href="data:,">
        <p style="width: 2000px">x</p><p><font color="#999999">grey</font></p>
        <img src="http://127.0.0.1:9/picture.png"><img src="data:image/png;base64,AAAA">""")
    browser.get_log("browser")
    emulate(browser, 360, "light")
    browser.get(page.as_uri())
    assert "http://127.0.0.1:9/picture.png" in requests(browser, page.as_uri())
    assert any("Content Security Policy" in entry["message"]
               for entry in browser.get_log("browser"))
    least = browser.execute_script(CONTRAST)
    assert least["text"] == "grey"
    assert least["ratio"] == pytest.approx(2.85, abs=0.01)
    assert browser.execute_script("return [...document.images].filter(i => i.naturalWidth).length"
                                  ) == 0
    page.write_text('<!doctype html><div style="width: 2000px">x</div>')
    emulate(browser, 1280, "light")
    browser.get(page.as_uri())
    assert browser.execute_script(OVERFLOW) > 700
