"""The site and the studio in a real browser, at the width of a desk and of a phone.

Needs Debian's chromium (`apt-get install chromium`; `.ci/run` does it) or another one named by `CHROMIUM`.
Pictures of the pages go to `screenshots/`.
"""
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import nbformat
import pytest

from dualreal.base import base_size, find_base
from dualreal.toy.world import write_case

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT/"screenshots"
NAMES = "chromium", "chromium-browser", "google-chrome"
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
DESK, PHONE = dict(width=1280, height=900), dict(width=390, height=844)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium (apt-get install chromium)")


@pytest.fixture(scope="session")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    PICTURES.mkdir(exist_ok=True)
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def tab(browser, here, size=DESK, **how): # here: host and port
    "A page, and the list of what is wrong with it: it asked somebody else for something, or complained."
    context = browser.new_context(viewport=size, reduced_motion="reduce", **how)  # no colours half-way
    context.set_default_navigation_timeout(240_000)  # Voilà answers when its notebook has run
    context.set_default_timeout(90_000)  # a busy machine is slow, not wrong
    page, wrong = context.new_page(), []
    def asked(request):
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.netloc != here: wrong.append(f"asked {request.url}")
    page.on("request", asked)
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page, wrong
    context.close()


@contextmanager
def visit(browser, url, size=DESK, **how):
    "A page that must have nothing wrong with it."
    with tab(browser, urlsplit(url).netloc, size, **how) as (page, wrong):
        page.goto(url)
        yield page
        assert not wrong


def overflow(page) -> list:
    "What sticks out of the page to the right, unless its box scrolls."
    return page.evaluate("""() => {
        const wide = document.documentElement.clientWidth + 1
        const scrolls = e => e && e !== document.body && e !== document.documentElement &&
            (['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement))
        const out = [...document.body.querySelectorAll('*')].filter(e => {
            const box = e.getBoundingClientRect()
            const style = getComputedStyle(e)
            return box.width && box.right > wide && box.left < wide && !scrolls(e.parentElement)
                && !scrolls(e) && style.position !== 'fixed' && style.visibility !== 'hidden'})
        return out.map(e => e.tagName + '.' + e.className).slice(0, 5)
    }""")


def pale(page, selector) -> list:
    "Texts whose contrast with what lies behind them is below WCAG's 4.5 (3 for large ones)."
    return page.evaluate("""selector => {
        const parse = c => (c.match(/[\\d.]+/g) || []).map(Number)
        const light = c => { const [r, g, b] = c.slice(0, 3).map(v => v / 255)
            .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
            return .2126 * r + .7152 * g + .0722 * b }
        const behind = e => { for (; e; e = e.parentElement) {
            const c = parse(getComputedStyle(e).backgroundColor)
            if (c.length === 3 || c[3] > .5) return c } return [255, 255, 255] }
        const seen = e => e.offsetParent && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())
        const bad = []
        for (const e of document.querySelectorAll(selector)) if (seen(e)) {
            const style = getComputedStyle(e), a = light(parse(style.color)), b = light(behind(e))
            const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05)
            const size = parseFloat(style.fontSize), large = size >= (style.fontWeight >= 700 ? 18.6 : 24)
            const told = `${e.tagName}.${e.className} ${ratio.toFixed(2)} ${e.innerText.slice(0, 30)}`
            if (ratio < (large ? 3 : 4.5) - .01) bad.push(told)
        }
        return bad.slice(0, 8)
    }""", selector)


def focused_by_keyboard(page, presses) -> list:
    "What Tab reaches, as a tester would see it: tag and name."
    seen = []
    for _ in range(presses):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("""() => { const e = document.activeElement
            const names = [e.getAttribute('aria-label'), e.innerText, e.title, e.placeholder, '']
            return e.tagName + ' ' + names.find(n => n !== null && n !== undefined).trim() }"""))
    return seen


@pytest.fixture(scope="session")
def site():
    "The built site, served; DOCS names one that is built already."
    folder = os.environ.get("DOCS")
    if folder is None:
        pytest.importorskip("sphinx_book_theme", reason="pip install -e '.[docs]'")
        command = [sys.executable, ROOT/"tools"/"docs.py"]
        built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        folder = ROOT/"_docs"
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *said): "Tests print what matters."
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield Path(folder), f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def pages(folder) -> list:
    special = {"genindex.html", "search.html", "py-modindex.html"}
    every = (p.relative_to(folder) for p in folder.rglob("*.html"))
    return sorted(p.as_posix() for p in every if "_static" not in p.parts and p.name not in special)


SHOWN = "index.html", "trainer.html", "toyworld.html", "cli.html", "studio.html" # that pictures are kept of


def test_every_page_loads_on_a_phone(browser, site):
    "Each page: nothing from elsewhere, no complaints, nothing sticks out, every picture says what it shows."
    folder, url = site
    problems = []
    with tab(browser, urlsplit(url).netloc, PHONE) as (page, wrong):
        for name in pages(folder):
            page.goto(f"{url}/{name}")
            if name in SHOWN: page.screenshot(path=PICTURES/f"site-phone-{name[:-5]}.png")
            mute = page.evaluate("""[...document.images].map(i => i.alt.trim()).filter(
                alt => !alt || /[.](png|gif|jpe?g|svg)$/.test(alt))""")
            found = [*(f"too wide: {what}" for what in overflow(page)), *(f"no alt text: {a}" for a in mute)]
            problems += [f"{name}: {what}" for what in [*wrong, *found]]
            wrong.clear()
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable(browser, site, scheme):
    folder, url = site
    problems = []
    with tab(browser, urlsplit(url).netloc, color_scheme=scheme) as (page, wrong):
        for name in SHOWN:
            page.goto(f"{url}/{name}")
            assert page.evaluate("document.documentElement.dataset.theme") == scheme
            page.screenshot(path=PICTURES/f"site-{scheme}-{name[:-5]}.png")
            problems += [f"{name}: {text}" for text in pale(page, "body *")]
    assert not problems, "\n".join(problems)


def test_search_finds_the_controller(browser, site):
    with visit(browser, f"{site[1]}/search.html?q=StageBlender") as page:
        page.wait_for_selector("#search-results li a")
        found = page.locator("#search-results li a").all_inner_texts()
        page.screenshot(path=PICTURES/"site-search.png")
    assert any("stageblender" in text.lower() for text in found), found


def test_keyboard_reaches_the_controls_of_the_site(browser, site):
    with visit(browser, f"{site[1]}/stageblender.html") as page:
        reached = " | ".join(focused_by_keyboard(page, 60))
        for control in ("skip to main content", "search", "trainer"):
            assert control in reached.lower(), reached
        page.keyboard.press("Control+k")
        page.keyboard.type("StageBlender")
        page.keyboard.press("Enter")
        page.wait_for_selector("#search-results li a")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def served(command, home, probe): # probe: an address that answers, even with an error, once the server is up
    "A server in the folder `home`."
    env = {**os.environ, "DUALREAL_CACHE": str(home/"cache"), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    with open(home/"server.log", "w") as log:
        server = subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            for _ in range(240):
                try: urllib.request.urlopen(probe, timeout=1)
                except urllib.error.HTTPError: break # it answers
                except OSError: time.sleep(.25)
                else: break
                assert server.poll() is None, (home/"server.log").read_text()
            yield
        finally: os.killpg(server.pid, signal.SIGTERM)


@pytest.fixture(scope="session")
def studio(tmp_path_factory):
    pytest.importorskip("voila", reason="pip install -e '.[studio]'")
    home = tmp_path_factory.mktemp("studio")
    write_case(home/"case", "teal_cat", "swinging", images=3, clips=2)
    url = f"http://127.0.0.1:{(port := free_port())}/"
    command = [sys.executable, "-m", "dualreal.cli", "studio", "--no-browser", f"--port={port}"]
    command.append(f"--out={home/'out'}")
    with served(command, home, url + "voila/static/"): yield home, url


def whole(page, name):
    "Keep a picture of all of the studio, which scrolls inside its page."
    size = page.viewport_size
    height = page.evaluate("Math.max(...[...document.querySelectorAll('*')].map(e => e.scrollHeight))")
    page.set_viewport_size({**size, "height": height + 20})
    page.wait_for_timeout(300)
    page.screenshot(path=PICTURES/name)
    page.set_viewport_size(size)


def ready(page): page.get_by_role("button", name="Preview", exact=True).wait_for(timeout=240_000)
def fill(page, label, text): page.get_by_label(label, exact=True).fill(str(text))
def press(page, name): page.get_by_role("button", name=name, exact=True).click()
def picture(page, name, wait=60_000):
    shown = page.locator(f'img[alt*="{name}"]')
    shown.wait_for(timeout=wait)
    return shown.get_attribute("src")


def train(page, steps, previews):
    "A run from Start to a video that plays."
    fill(page, "Steps", steps)
    fill(page, "Previews", previews)
    press(page, "Start")
    picture(page, "Loss by dimension", 120_000)
    page.get_by_text("Finished: ").wait_for(timeout=240_000)
    film = page.locator("video").first
    film.wait_for()
    film.scroll_into_view_if_needed()  # a film out of sight does not start
    page.wait_for_function("document.querySelector('video').currentTime > 0")
    assert page.evaluate("document.querySelector('video').videoWidth") == base_size(find_base("toy")).width


def turn_the_dial(page):
    "By keyboard, to 0.4: another picture of the weights."
    before = picture(page, "Identity weight by depth")
    page.get_by_role("slider").first.focus()
    for _ in range(4): page.keyboard.press("ArrowRight")
    page.locator('img[alt*="at dial 0.4"]').wait_for()
    assert picture(page, "at dial 0.4") != before


def make_video(page, home):
    "A wrong folder, a case, 3 steps, the dial, a video."
    ready(page)
    fill(page, "Images", "no/such/folder")
    fill(page, "Clips", home/"case"/"motion")
    press(page, "Preview")
    said = page.get_by_role("alert")
    said.wait_for()
    assert "no/such/folder does not exist" in said.inner_text()
    whole(page, "studio-error.png")
    fill(page, "Images", home/"case"/"identity")
    press(page, "Preview")
    picture(page, "as they are trained on")
    train(page, 3, 0)
    turn_the_dial(page)
    fill(page, "Denoising", 4)
    press(page, "Make video")
    page.locator('video[aria-label*="dial 0.4"]').wait_for(timeout=180_000)


def test_studio_from_photos_to_video(browser, studio):
    home, url = studio
    with visit(browser, url) as page:
        make_video(page, home)
        assert not overflow(page) and not pale(page, ".dr *")


@pytest.mark.slow
def test_studio_compares_and_exports(browser, studio):
    "On the way the planner's estimate; then a comparison, and the archive."
    home, url = studio
    with visit(browser, url) as page:
        ready(page)
        fill(page, "Run", "second")
        make_video(page, home)
        press(page, "Will it fit?")
        page.get_by_text("predicted peak").wait_for(timeout=180_000)
        page.get_by_label("Adapters", exact=True).select_option(["base alone", "second"])
        press(page, "Compare")
        page.locator('video[aria-label="second"]').wait_for(timeout=180_000)
        press(page, "Export")
        page.locator("a[download]").wait_for(timeout=180_000)
        whole(page, "studio-desk.png")
        assert not overflow(page) and not pale(page, ".dr *")


def test_studio_on_a_phone_finds_the_run(browser, studio):
    "Another page, after the first was closed: the same run, and controls that a thumb and a keyboard reach."
    home, url = studio
    with visit(browser, url, PHONE) as page:
        ready(page)
        page.get_by_text("Finished: ").wait_for(timeout=180_000)
        picture(page, "Identity weight by depth")
        whole(page, "studio-phone.png")
        assert not overflow(page)
        (home/"large.png").write_bytes(bytes(12_000_000))  # servers refuse more than 10 MB unless told
        photos = [home/"large.png", *sorted((home/"case"/"identity").rglob("*.png"))]
        with page.expect_file_chooser() as chooser: page.get_by_role("button", name="Upload images").click()
        chooser.value.set_files(photos)
        kept = "document.querySelector('input[type=text]').value.endsWith('identity')"
        page.wait_for_function(kept, timeout=180_000)
        assert {p.name: p.stat().st_size for p in photos} == {
            p.name: p.stat().st_size for p in (home/"out"/"case"/"identity").iterdir()}
        reached = " | ".join(focused_by_keyboard(page, 40))
        for control in ("Upload images", "Preview", "Start", "Stop", "Make video", "Compare", "Export"):
            assert control in reached, reached


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    "JupyterLab with a notebook of one cell: the studio."
    pytest.importorskip("jupyterlab", reason="pip install jupyterlab")
    home = tmp_path_factory.mktemp("lab")
    write_case(home/"case", "olive_robot", "hopping", images=3, clips=2)
    cell = nbformat.v4.new_code_cell("from dualreal.studio import studio\nstudio()")
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), home/"studio.ipynb")
    url = f"http://127.0.0.1:{(port := free_port())}/"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
               "--ip=127.0.0.1", "--IdentityProvider.token=", "--LabApp.news_url=",
               f"--ServerApp.root_dir={home}"]
    with served(command, home, url + "api"): yield home, url


def run_the_cell(page, tries=24):
    "Shift+Enter until the prompt says that it ran: JupyterLab drops keys while it still lays out its page."
    ran = page.locator(".jp-CodeCell .jp-InputPrompt").get_by_text(re.compile(r"\[[*\d]")).first
    asked = page.locator(".jp-Dialog .jp-mod-accept")  # which kernel, where none runs yet: it names ours
    for _ in range(tries):
        if asked.count(): page.keyboard.press("Enter")
        else:
            page.locator(".jp-CodeCell .cm-content").first.click()
            page.keyboard.press("Shift+Enter")
        for _ in range(20):
            if ran.count() or asked.count(): break
            page.wait_for_timeout(250)
        if ran.count(): return
    page.screenshot(path=PICTURES/"studio-lab.png")
    pytest.fail(f"the cell did not run in {tries} tries: see {PICTURES/'studio-lab.png'}")


@contextmanager
def case_in_lab(browser, home, url):
    "The cell is run, a case is set up."
    with tab(browser, urlsplit(url).netloc) as (page, _):  # what JupyterLab itself logs is not ours
        page.goto(f"{url}lab/tree/studio.ipynb?reset")
        page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for(timeout=240_000)
        run_the_cell(page)
        ready(page)
        fill(page, "Images", home/"case"/"identity")
        fill(page, "Clips", home/"case"/"motion")
        press(page, "Preview")
        picture(page, "as they are trained on")
        yield page


def test_studio_opens_in_jupyterlab(browser, lab):
    with case_in_lab(browser, *lab): pass


@pytest.mark.slow
def test_studio_trains_in_jupyterlab(browser, lab):
    "20 steps, a preview, a video, the dial."
    with case_in_lab(browser, *lab) as page:
        train(page, 20, 1)
        turn_the_dial(page)
        page.screenshot(path=PICTURES/"studio-lab.png")
