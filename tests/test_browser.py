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
import psutil
import pytest

from dualreal.base import base_size, find_base
from dualreal.desk import post, worker_of
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
    context.set_default_navigation_timeout(240_000)  # JupyterLab takes its time
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
            yield server
        finally:
            if server.poll() is None: os.killpg(server.pid, signal.SIGTERM)
            server.wait(180)


@pytest.fixture(scope="session")
def studio(tmp_path_factory):
    home = tmp_path_factory.mktemp("studio")
    write_case(home/"case", "teal_cat", "swinging", images=3, clips=2)
    url = f"http://127.0.0.1:{(port := free_port())}/"
    command = [sys.executable, "-m", "dualreal.cli", "studio", "--no-browser", f"--port={port}"]
    command.append(f"--out={home/'out'}")
    with served(command, home, url) as server: yield home, url, psutil.Process(server.pid)


def whole(page, name):
    "Keep a picture of all of the studio."
    page.wait_for_timeout(300)
    page.screenshot(path=PICTURES/name, full_page=True)


def ready(page): page.get_by_role("button", name="Start training", exact=True).wait_for(timeout=240_000)
def fill(page, label, text): page.get_by_label(label, exact=True).first.fill(str(text))
def press(page, name): page.get_by_role("button", name=name, exact=True).first.click()
def picture(page, name, wait=60_000):
    shown = page.locator(f'img[alt*="{name}"]')
    shown.wait_for(timeout=wait)
    return shown.get_attribute("src")


def states(page, state, wait=600_000): # the first step waits for PyTorch, which takes a busy machine a minute
    "Wait until the chosen run is in a state."
    page.locator(f".dr-run:has(:checked) .dr-state.{state}").wait_for(timeout=wait)


def memory(server) -> float: # MB
    return sum(p.memory_full_info().uss for p in [server, *server.children(recursive=True)]) / 2**20


def plays(page, film):
    film.scroll_into_view_if_needed()
    film.evaluate("v => v.play()")
    page.wait_for_function("v => v.currentTime > 0", arg=film.element_handle())
    assert film.evaluate("v => v.videoWidth") == base_size(find_base("toy")).width


def test_studio_example_from_click_to_video(browser, studio):
    "A wrong folder and its message, which goes; the example; the dial; a video that plays."
    home, url, _ = studio
    with visit(browser, url) as page:
        fill(page, "Images", "no/such/folder")
        page.keyboard.press("Tab")  # a path is not judged while it is typed
        said = page.get_by_role("alert").first
        said.wait_for()
        assert "no/such/folder does not exist" in said.inner_text()
        press(page, "Start training")
        page.get_by_text("Clips: choose files").wait_for()
        whole(page, "studio-error.png")
        fill(page, "Steps", 3)
        fill(page, "Previews", 0)
        press(page, "Try the example")
        page.get_by_text("This case can be trained").wait_for(timeout=180_000)
        assert not page.get_by_role("alert").count()
        states(page, "finished")
        picture(page, "Loss by dimension after 3 steps")
        before = picture(page, "Identity weight by depth")
        page.get_by_role("slider").first.focus()
        for _ in range(4): page.keyboard.press("ArrowRight")
        assert picture(page, "at dial 0.4") != before
        fill(page, "Denoising", 4)
        press(page, "Make video")
        film = page.locator('.dr-gallery video[aria-label*="dial 0.4"]')
        film.wait_for(timeout=300_000)
        plays(page, film)
        whole(page, "studio-desk.png")
        assert not overflow(page) and not pale(page, ".dr *")


def test_studio_keeps_a_run_through_a_reload_and_on_two_pages(browser, studio):
    home, url, _ = studio
    with visit(browser, url) as page, visit(browser, url) as other:
        fill(page, "Images", home/"case"/"identity")
        fill(page, "Clips", home/"case"/"motion")
        fill(page, "Run", "long")
        fill(page, "Steps", 5000)
        press(page, "Start training")
        states(page, "running")
        said = re.compile(r"Training: [1-9]\d* of 5000, .* left")
        page.locator(".dr-where", has_text=said).wait_for(timeout=300_000)
        page.reload()
        states(page, "running")
        assert page.get_by_label("Images", exact=True).input_value() == str(home/"case"/"identity")
        other.reload()
        other.locator(".dr-run", has_text="long").click()
        states(other, "running")
        picture(other, "Loss by dimension")
        with visit(browser, url) as third:  # a tab that knows nothing yet: the live run and its case
            states(third, "running")
            assert third.get_by_label("Clips", exact=True).input_value() == str(home/"case"/"motion")
        press(other, "Stop")
        for one in (page, other): states(one, "stopped", 120_000)
        page.get_by_role("button", name="Resume", exact=True).wait_for()
        page.get_by_role("button", name="Delete", exact=True).first.click()
        page.get_by_text("Move run long to the bin?").wait_for()
        page.get_by_role("button", name="Yes", exact=True).click()
        page.locator(".dr-run", has_text="long").wait_for(state="detached")


def test_studio_reloads_leave_nothing(browser, studio):
    "Twenty reloads and plain requests: no process more, and less than 300 MB."
    home, url, server = studio
    with visit(browser, url) as page:
        ready(page)
        before, count = memory(server), len(server.children(recursive=True))
        for _ in range(20):
            page.reload()
            ready(page)
            urllib.request.urlopen(url).read()
        assert len(server.children(recursive=True)) == count
        assert memory(server) - before < 300


def test_studio_ends_with_its_worker(tmp_path):
    "SIGTERM leaves no process, even while a run begins."
    url = f"http://127.0.0.1:{(port := free_port())}/"
    words = [sys.executable, "-m", "dualreal.cli", "studio", "--no-browser", f"--port={port}", "--out=out"]
    with served(words, tmp_path, url) as server:
        post(tmp_path/"out", "train", dict(identity="a", motion="b", out=str(tmp_path/"out"/"run")))
        end = time.monotonic() + 60
        while not (worker := worker_of(tmp_path/"out")) and time.monotonic() < end: time.sleep(.1)
        assert worker.is_running()
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0
        assert not worker.is_running()


@pytest.mark.slow
def test_studio_compares_measures_and_saves(browser, studio):
    "The planner's sentence; two videos in step; scores; zip and GIF."
    home, url, _ = studio
    with visit(browser, url) as page:
        press(page, "Will it fit?")
        page.get_by_text(re.compile(r"Yes, it fits: [\d.]+ of [\d.]+ GB")).wait_for(timeout=300_000)
        fill(page, "Steps", 3)
        press(page, "Try the example")
        states(page, "finished")
        for i in range(2): page.locator("[data-pick]").nth(i).check()
        play = "[...document.querySelectorAll('#compare video')].every(v => v.currentTime > 0)"
        page.wait_for_function(play)
        assert page.locator("#compare video").count() == 2
        whole(page, "studio-compare.png")
        press(page, "Scores")
        page.locator(".dr-scores").wait_for(timeout=300_000)
        press(page, "Save as zip")
        for link in (page.get_by_text("Download"), page.get_by_role("link", name="gif").first):
            with page.expect_download(timeout=300_000) as saved: link.click(timeout=300_000)
            assert saved.value.path().stat().st_size > 1000
        assert not overflow(page) and not pale(page, ".dr *")


def test_studio_on_a_phone_and_by_keyboard(browser, studio):
    "One column, uploads that a server might refuse, and controls that a thumb and a keyboard reach."
    home, url, _ = studio
    with visit(browser, url, PHONE) as page:
        ready(page)
        whole(page, "studio-phone.png")
        assert not overflow(page)
        (home/"large.png").write_bytes(bytes(12_000_000))
        photos = [home/"large.png", *sorted((home/"case"/"identity").rglob("*.png"))]
        page.locator('[data-upload="identity"]').set_input_files(photos)
        page.locator('[data-section="identity"] img').nth(2).wait_for(timeout=180_000)
        folder = Path(page.get_by_label("Images", exact=True).input_value())
        assert folder.parent == home/"out"/"case"
        sizes = [{p.name: p.stat().st_size for p in some} for some in (photos, folder.iterdir())]
        assert sizes[0] == sizes[1]
        page.keyboard.press("Escape")
        page.evaluate("document.activeElement.blur()")
        reached = " | ".join(focused_by_keyboard(page, 70))
        for control in ("Try the example", "Start training", "Will it fit?", "Make video", "Open"):
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


def plain_fill(page, label, text):
    "As `fill`, and the widget's kernel hears of it."
    page.get_by_label(label, exact=True).first.fill(str(text))
    page.keyboard.press("Tab")


@contextmanager
def case_in_lab(browser, home, url):
    "The cell is run, a case is set up."
    with tab(browser, urlsplit(url).netloc) as (page, _):  # what JupyterLab itself logs is not ours
        page.goto(f"{url}lab/tree/studio.ipynb?reset")
        page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for(timeout=240_000)
        run_the_cell(page)
        ready(page)
        plain_fill(page, "Images", home/"case"/"identity")
        plain_fill(page, "Clips", home/"case"/"motion")
        page.get_by_text("This case can be trained").wait_for(timeout=180_000)
        yield page


def test_studio_opens_in_jupyterlab(browser, lab):
    with case_in_lab(browser, *lab): pass


@pytest.mark.slow
def test_studio_trains_in_jupyterlab(browser, lab):
    "20 steps, a video of the run, the weights."
    with case_in_lab(browser, *lab) as page:
        plain_fill(page, "Steps", 20)
        press(page, "Start training")
        picture(page, "Loss by dimension after 20 steps", 600_000)
        picture(page, "Identity weight by depth", 300_000)
        assert page.locator(".dr-films video").count()
        page.screenshot(path=PICTURES/"studio-lab.png")
