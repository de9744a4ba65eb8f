"""The report as a browser shows it: in headless Chromium, without a network."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import hostile_folder
from toys_report import HOSTILE, models, write_table

from ensdef.report import library, render

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (pip install 'ensdef[test]')")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None,
    reason="needs Chromium and chromedriver on the PATH (apt install chromium-driver)",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--window-size=1280,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    write_table(results, "second", models()[:4], title="Second")
    write_table(results, "toy", models(), title="Toys", kind="leaderboard")
    (results / "report.html").write_text(render(results), encoding="utf-8")
    return results / "report.html"


@pytest.fixture
def opened(browser: Any, page: Path) -> Iterator[Any]:
    """The page, opened from disk, its charts drawn; whatever a test does, nothing may be complained of or requested."""
    show(browser, page)
    yield browser
    nothing_was_wrong(browser, page)


def show(browser: Any, page: Path, width: int = 1280, scheme: str = "light") -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get_log("browser"), browser.get_log("performance")
    browser.get("about:blank")
    browser.get(page.as_uri())
    shown = "[...document.querySelectorAll('.plot')].filter(plot => plot.clientWidth)"
    until(browser, f"return {shown}.every(plot => plot.matches('.drawn'))")


def until(browser: Any, condition: str, seconds: float = 10) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, seconds).until(lambda driver: driver.execute_script(condition))


def settled(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for what a key or a click starts."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def nothing_was_wrong(browser: Any, page: Path) -> None:
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requested = [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]
    assert {url.partition("#")[0] for url in requested if not url.startswith(("data:", "about:"))} <= {page.as_uri()}


def rows(browser: Any) -> list[str]:
    """Labels of the rows that are shown, from top to bottom."""
    script = """
        return [...document.querySelectorAll('.panel:not([hidden]) .board tbody tr')]
            .filter(row => row.offsetParent).map(row => row.querySelector('.name .value').textContent)"""
    return list(browser.execute_script(script))


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def keys(browser: Any, *names: str) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.switch_to.active_element.send_keys(*(getattr(Keys, name, name) for name in names))


def test_every_row_and_every_chart_is_shown(opened: Any) -> None:
    assert rows(opened) == ["adv_en", "soe[sigma=1]", "adp", "nat"]
    assert opened.execute_script("return document.querySelectorAll('.panel:not([hidden]) .plot svg').length") == 3
    assert "4 of 4 rows" in find(opened, ".filters output").text


def test_a_column_is_sorted_by_keyboard_both_ways_and_says_so(opened: Any) -> None:
    heading = find(opened, ".panel:not([hidden]) th[data-kind=text] button")
    heading.send_keys("\n")
    assert rows(opened) == ["adp", "adv_en", "nat", "soe[sigma=1]"]
    assert find(opened, ".panel:not([hidden]) [aria-sort]").get_attribute("aria-sort") == "ascending"
    heading.send_keys("\n")
    assert rows(opened) == ["soe[sigma=1]", "nat", "adv_en", "adp"]
    assert find(opened, ".panel:not([hidden]) [aria-sort]").get_attribute("aria-sort") == "descending"


def test_numbers_are_sorted_as_numbers(opened: Any) -> None:
    find(opened, ".panel:not([hidden]) th:nth-child(5) button").click()
    cells = "document.querySelectorAll('.panel:not([hidden]) .board td:nth-child(5)')"
    values = opened.execute_script(f"return [...{cells}].map(cell => Number(cell.dataset.value))")
    assert values == sorted(values, reverse=True)
    assert len(set(values)) > 1


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("text", "SOE", ["soe[sigma=1]"]),
        ("text", "small adp", ["adp"]),
        ("method", "soe", ["soe[sigma=1]"]),
        ("training", "adversarial images", ["adv_en", "soe[sigma=1]", "adp"]),
        ("training", "clean images", ["nat"]),
        ("flags", "hide masking", ["adv_en", "soe[sigma=1]", "nat"]),
        ("flags", "hide flagged", ["adv_en", "soe[sigma=1]"]),
        ("text", "no such model", []),
    ],
)
def test_a_filter_leaves_what_fits_and_counts_it(opened: Any, field: str, value: str, expected: list[str]) -> None:
    find(opened, f".panel:not([hidden]) [name={field}]").send_keys(value)
    assert rows(opened) == expected
    assert find(opened, ".panel:not([hidden]) output").text == f"{len(expected)} of 4 rows"
    assert find(opened, ".panel:not([hidden]) .nothing").is_displayed() == (not expected)
    find(opened, ".panel:not([hidden]) [type=reset]").click()
    until(opened, "return document.querySelector('.panel:not([hidden]) output').textContent === '4 of 4 rows'")


def test_the_drawer_opens_by_keyboard_closes_by_escape_and_gives_the_focus_back(opened: Any) -> None:
    place = rows(opened).index("adp") + 1
    cell = find(opened, f".panel:not([hidden]) tbody tr:nth-child({place}) td:nth-child(5) button.cell")
    opened.execute_script("arguments[0].focus()", cell)
    keys(opened, "ENTER")
    drawer = find(opened, "#drawer")
    settled(lambda: drawer.is_displayed())
    assert "adp under suite" in drawer.text
    assert "zero_gradient (masking" in drawer.text
    assert "What to do: attack with scores alone" in drawer.text
    assert "ensdef run toy" in drawer.text
    keys(opened, "ESCAPE")
    settled(lambda: not drawer.is_displayed())
    assert opened.switch_to.active_element == cell


def test_a_cell_of_several_records_lists_them(opened: Any) -> None:
    place = rows(opened).index("adv_en") + 1
    find(opened, f".panel:not([hidden]) tbody tr:nth-child({place}) th button.cell").click()
    summaries = opened.find_elements("css selector", "#drawer summary")
    titles = [" ".join(summary.get_attribute("textContent").split()) for summary in summaries]
    assert len(titles) == 4
    assert titles[0] == "adv_en under suite linf eps 0.2, seed 0: 75.0 ± 21.7 %"
    find(opened, "#drawer .close").click()
    assert not find(opened, "#drawer").is_displayed()


def test_protocols_are_changed_with_the_arrow_keys(opened: Any) -> None:
    opened.execute_script("document.querySelector('[role=tab][aria-selected=true]').focus()")
    keys(opened, "ARROW_RIGHT")
    assert rows(opened) == ["adv_en"]
    assert find(opened, "[role=tab][aria-selected=true]").text == "second"
    keys(opened, "ARROW_LEFT")
    assert len(rows(opened)) == 4


def colours(browser: Any) -> tuple[str, str, str]:
    script = """
        const of = (selector, what) => getComputedStyle(document.querySelector(selector))[what];
        return [of('body', 'backgroundColor'), of('body', 'color'), of('.plot svg .role-axis-label text', 'fill')]"""
    return tuple(browser.execute_script(script))


def test_the_page_and_its_charts_follow_the_systems_colours_until_one_is_chosen(browser: Any, page: Path) -> None:
    show(browser, page, scheme="light")
    light = colours(browser)
    show(browser, page, scheme="dark")
    dark = colours(browser)
    assert light[0] == "rgb(255, 255, 255)"
    assert not {*light} & {*dark}
    find(browser, ".theme [data-theme=light]").click()
    assert colours(browser) == light
    assert find(browser, ".theme [data-theme=light]").get_attribute("aria-pressed") == "true"
    find(browser, ".theme [data-theme=auto]").click()
    assert colours(browser) == dark
    nothing_was_wrong(browser, page)


@pytest.mark.parametrize("width", [360, 390, 768])
def test_a_narrow_page_scrolls_its_tables_and_not_itself(browser: Any, page: Path, width: int) -> None:
    show(browser, page, width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    charts = browser.execute_script("return [...document.querySelectorAll('svg')].map(chart => chart.clientWidth)")
    assert max(charts) <= width
    box = "document.querySelector('.panel:not([hidden]) .scroll')"
    browser.execute_script(f"{box}.scrollLeft = 1000")
    name, edge = browser.execute_script(
        f"return [{box}.querySelector('tbody th').getBoundingClientRect().left, {box}.getBoundingClientRect().left]"
    )
    assert name == pytest.approx(edge, abs=2), "the first column stays"
    find(browser, ".panel:not([hidden]) tbody tr:nth-child(1) th button.cell").click()
    drawn = browser.execute_script("return document.getElementById('drawer').getBoundingClientRect().width")
    assert drawn == (width if width < 600 else pytest.approx(544, abs=1))
    keys(browser, "ESCAPE")
    nothing_was_wrong(browser, page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(browser: Any, page: Path, scheme: str) -> None:
    show(browser, page, scheme=scheme)
    script = """
        const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
        const rgb = (colour) => {
          canvas.clearRect(0, 0, 1, 1);
          canvas.fillStyle = colour;
          canvas.fillRect(0, 0, 1, 1);
          return [...canvas.getImageData(0, 0, 1, 1).data];
        };
        const light = ([r, g, b]) => {
          const part = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
          return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
        };
        const behind = (node) => {
          for (let here = node; here; here = here.parentElement) {
            const colour = rgb(getComputedStyle(here).backgroundColor);
            if (colour[3] === 255) return colour;
          }
          return [255, 255, 255];
        };
        const faint = [];
        for (const node of document.querySelectorAll('body *')) {
          const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
          if (!own || !node.checkVisibility() || node.closest('script, .skip')) continue;
          const style = getComputedStyle(node);
          const text = rgb(node.closest('svg') ? style.fill : style.color);
          const [a, b] = [light(text), light(behind(node))];
          const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          if (contrast < 4.5) faint.push(`${node.textContent.trim().slice(0, 40)}: ${contrast.toFixed(2)}`);
        }
        return faint"""
    assert browser.execute_script(script) == []


def test_what_a_hostile_record_says_is_shown_and_not_run(browser: Any, tmp_path: Path) -> None:
    results = hostile_folder(tmp_path)
    page = results / "report.html"
    page.write_text(render(results), encoding="utf-8")
    show(browser, page)
    assert {*HOSTILE} <= {text.replace("\n", "") for text in rows(browser)}
    for cell in browser.find_elements("css selector", ".board button.cell"):
        browser.execute_script("arguments[0].click()", cell)
        browser.execute_script("document.querySelectorAll('#drawer details').forEach(told => { told.open = true; })")
        keys(browser, "ESCAPE")
    assert browser.execute_script("return window.broken") is None
    assert browser.execute_script("return document.querySelectorAll('img, b, iframe').length") == 0
    nothing_was_wrong(browser, page)


def test_a_script_that_is_not_ours_is_stopped_by_the_policy(browser: Any, page: Path, tmp_path: Path) -> None:
    attacked = tmp_path / "attacked.html"
    text = page.read_text(encoding="utf-8").replace("</main>", "<script>window.broken = 1</script></main>")
    attacked.write_text(text, encoding="utf-8")
    show(browser, attacked)
    assert browser.execute_script("return window.broken") is None
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_the_library_is_in_the_page_and_the_page_below_three_megabytes(page: Path) -> None:
    assert library.chart_library() in page.read_text(encoding="utf-8")
    assert page.stat().st_size < 3e6
