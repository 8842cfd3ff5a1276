"""The page at /, driven in headless Chromium."""
# ruff: noqa: E402 (what is not installed skips the file before it is imported)

import shutil
import threading

import pytest
from naive import NaiveBackend
from serving import make_checkpoint, serving

pytest.importorskip("starlette")
webdriver = pytest.importorskip("selenium.webdriver")
if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("there is no chromium, or no chromedriver", allow_module_level=True)

from selenium.webdriver.chrome.service import Service as ChromeDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from tiered.engine import Engine
from tiered.serve.scheduler import Scheduler
from tiered.serve.service import Service

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1280,900",
]  # fmt: skip
SLOTS = 6 * 3 * 96 * 64 * 4


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("model"), context=1024)
    with (
        Engine(path, backend=NaiveBackend(), quantize="none", threads=1, expert_ram=SLOTS,
               context=1024) as engine,
        Scheduler(engine) as scheduler,
    ):  # fmt: skip
        yield Service(engine, scheduler, ["tiny"])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, ChromeDriver(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(service, browser):
    with serving(service) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        yield browser
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
        browser.get("about:blank")
    service.draining = False


def wait(page, condition):
    return WebDriverWait(page, 30, poll_frequency=0.05).until(lambda _: condition())


def find(page, selector):
    return page.find_element(By.CSS_SELECTOR, selector)


def say(page, text, longest):
    page.execute_script(f"document.getElementById('max_tokens').value = {longest}")
    find(page, "#input").send_keys(text + Keys.ENTER)


def test_a_conversation_streams_and_the_picture_moves(page):
    wait(page, lambda: find(page, "#state").text == "live")
    say(page, "Hello", 12)
    note = wait(page, lambda: page.find_elements(By.CSS_SELECTOR, ".assistant .note"))[0]
    assert note.text.startswith("12 tokens")
    say(page, "More", 5)
    wait(page, lambda: len(page.find_elements(By.CSS_SELECTOR, ".assistant .note")) == 2)
    assert len(page.find_elements(By.CSS_SELECTOR, ".message.user")) == 2
    wait(page, lambda: find(page, "#hits").text.endswith("%"))
    drawn = "return [...document.getElementById('grid').getContext('2d')" \
            ".getImageData(0, 0, 300, 30).data].some((value) => value)"  # fmt: skip
    assert page.execute_script(drawn)
    find(page, "#new").click()
    assert not page.find_elements(By.CSS_SELECTOR, ".message")


def test_stop_ends_an_answer(page, service):
    before = service.scheduler.counts.finished["cancelled"]
    say(page, "Go on and on", 900)
    wait(page, lambda: service.scheduler.running)
    clicked = threading.Event()
    service.scheduler.call(
        lambda: clicked.wait(60)
    )  # however slow the browser is, the answer goes on
    wait(page, lambda: find(page, "#stop").is_displayed())
    find(page, "#stop").click()
    clicked.set()
    wait(page, lambda: service.scheduler.counts.finished["cancelled"] == before + 1)
    wait(page, lambda: find(page, "#send").is_displayed())
    assert find(page, ".assistant .note").text == "stopped"


def test_errors_are_shown(page):
    say(page, "x" * 3000, 5)
    note = wait(page, lambda: page.find_elements(By.CSS_SELECTOR, ".note.error"))[0]
    assert "the context holds 1024" in note.text
    page.get_log("browser")  # the browser logs each response that is an error


def test_budgets_can_be_changed(page, service):
    wait(page, lambda: find(page, "#expert_ram").is_displayed())
    find(page, "#expert_ram").send_keys(Keys.ARROW_LEFT * 10)
    wait(page, lambda: service.live.tier.residency.space.capacity < SLOTS)
    find(page, "#look_ahead").send_keys("3")
    wait(page, lambda: service.engine.prefetcher.distance == 3)
    assert find(page, "#changed").text == "changed"


def test_the_grid_is_read_by_keyboard(page):
    wait(page, lambda: find(page, "#state").text == "live")
    find(page, "#grid").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    wait(page, lambda: find(page, "#cell").text.startswith("layer 1, expert 1: "))


def test_a_phone_shows_one_view_at_a_time(page):
    size = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert find(page, "#chat").is_displayed() and not find(page, "#live").is_displayed()
        find(page, "nav button[data-view=live]").click()
        assert find(page, "#live").is_displayed() and not find(page, "#chat").is_displayed()
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
