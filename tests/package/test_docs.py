"""What the README and the pages show runs as it stands; links lead somewhere."""

import re
import subprocess
import sys

import pytest

from tests.package import markdown
from tests.support import REPOSITORY, quick

DOCS = REPOSITORY / "docs"
WRITTEN = sorted([*DOCS.rglob("*.md"), *REPOSITORY.glob("*.md")])
PAGES = [page for page in WRITTEN if markdown.blocks(page)]

_LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_blocks_of_the_readme_are_found():
    assert len(markdown.blocks(REPOSITORY / "README.md")) >= 4


def name(page):
    return str(page.relative_to(REPOSITORY))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_of_a_page_run_one_after_the_other(page):
    for package in ("flax", "optax", "safetensors"):
        if package in page.read_text(encoding="utf-8"):
            pytest.importorskip(package)
    with quick.compilation():
        assert markdown.run(page) == len(markdown.blocks(page))


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_links_lead_somewhere(page):
    # Python and shell have brackets and parentheses of their own.
    text = re.sub(
        r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.S
    )
    broken = []
    for link in _LINK.findall(text):
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        if re.match(r"\w+:", link):
            continue
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert not broken


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in titles
    }


def test_the_pictures_are_those_of_the_script(tmp_path):
    pytest.importorskip("matplotlib")
    drawn = sorted((DOCS / "images").glob("*.svg"))
    script = tmp_path / "docs" / "figures.py"
    script.parent.mkdir()
    script.write_bytes((DOCS / "figures.py").read_bytes())
    subprocess.run([sys.executable, str(script)], check=True, timeout=120)
    texts = re.compile(r"<text[^>]*>([^<]*)</text>")
    assert len(drawn) == 2
    for image in drawn:
        again = script.parent / "images" / image.name
        written, now = (texts.findall(p.read_text()) for p in (image, again))
        assert written and written == now, f"{image}: run python docs/figures.py"


def test_the_reference_has_every_public_name():
    pytest.importorskip("flax")
    import jax_causal_conv
    from jax_causal_conv import mamba2, nnx

    pages = (page.read_text() for page in (DOCS / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: [\w.]+\.(\w+)$", "\n".join(pages), re.M))
    public = {*jax_causal_conv.__all__, *mamba2.__all__, *nnx.__all__}
    plain = {"GREEDY", "__version__", "default_bias_init", "default_kernel_init"}
    assert not public - shown - plain
