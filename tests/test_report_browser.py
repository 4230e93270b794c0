"""The page in a real browser: headless chromium, at a phone's width and a desk's, light and dark, and in print."""

import json
import re
import shutil
import subprocess

import pytest

from aqtx.report.parts import PARTS
from aqtx.report.write import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: install it to check the page")

# The page itself runs no script; this one is added to a copy of it and writes what it saw into the title.
PROBE = """<script>addEventListener("load", () => { const root = document.documentElement; document.title =
JSON.stringify({width: innerWidth, content: root.scrollWidth, paper: getComputedStyle(document.body).backgroundColor,
images: [...document.images].map(image => image.naturalWidth),
sections: [...document.querySelectorAll("section")].map(s => [s.id, s.getBoundingClientRect().height])}); })</script>"""


def browse(path, *flags):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    profile = f"--user-data-dir={path.parent / 'profile'}"
    done = subprocess.run(
        [*command, profile, *flags, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    return done.stdout


def probe(path, *flags):
    html = browse(path, "--virtual-time-budget=2000", "--dump-dom", *flags)
    return json.loads(re.search(r"<title>(.*?)</title>", html)[1].replace("&gt;", ">"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    names = [f"model.layers.{i}.mlp.experts.{e}.{p}_proj" for i in (0, 1) for e in range(4) for p in ("gate", "down")]
    rows = [f"{name},{2 + index % 5},mlp,x,x,x,64,1,1,full" for index, name in enumerate(names)]
    header = "layer_name,alpha_hill,category,shape,out_features,in_features,numel,k_used,n_eigs,method"
    (folder / "alpha.csv").write_text("\n".join([header, *rows]) + "\n")
    (folder / "report.json").write_text(json.dumps({"name": "page", "settings": {"long": "word" * 200}}))
    write_report(folder)
    checked = folder / "checked.html"
    checked.write_text((folder / "report.html").read_text().replace("</body>", PROBE + "</body>"))
    return checked


@pytest.mark.parametrize("width", [500, 1300])
def test_every_section_shows_every_image_loads_and_nothing_overflows(page, width):
    seen = probe(page, f"--window-size={width},900")
    assert [name for name, height in seen["sections"] if height > 30] == [part.anchor for part in PARTS]
    assert len(seen["images"]) == 5
    assert all(pixels > 100 for pixels in seen["images"])
    assert seen["content"] <= seen["width"] == width


def test_the_dark_page_is_dark(page):
    assert probe(page)["paper"] == "rgb(255, 255, 255)"
    assert probe(page, "--blink-settings=preferredColorScheme=0")["paper"] == "rgb(22, 23, 27)"


def test_a_screenshot_and_a_print_come_out(page):
    from PIL import Image

    shot, paper = page.parent / "shot.png", page.parent / "page.pdf"
    browse(page, "--window-size=800,3000", f"--screenshot={shot}")
    with Image.open(shot) as image:
        assert image.size == (800, 3000)
        assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 100  # figures, not a blank sheet
    browse(page, "--no-pdf-header-footer", f"--print-to-pdf={paper}")
    assert paper.read_bytes().startswith(b"%PDF")
