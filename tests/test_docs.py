"""The book of `make docs`: it holds every notebook, as nbdev's directives want it read, and every link in it leads somewhere."""
import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from html import unescape
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
BOOK = runpy.run_path(str(ROOT / "docs/conf.py"))
NEEDED = ("sphinx", "myst_nb", "furo", "mathjax")


def cell(source, *printed):
    return dict(cell_type="code", metadata={}, source=source, outputs=[dict(output_type="stream", text=list(printed))])


def test_every_notebook_has_one_place_in_the_sidebar():
    inside = [page for chapter in BOOK["CHAPTERS"] for page in BOOK["pages"](chapter)]
    there = [*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("results/record/*/*.ipynb"), ROOT / "data_prep/README.md", ROOT / "results/README.md"]
    assert sorted(inside) == sorted(p.relative_to(ROOT).with_suffix("").as_posix() for p in there)
    assert all(BOOK["pages"](chapter) for chapter in BOOK["CHAPTERS"])


def test_directives_are_obeyed_and_not_shown():
    cells = [cell("#| default_exp book"), cell("#| export\n\ndef one(): return 1"), cell("#| hide\nsecret = 2"),
             cell(["#| hide_input\n", "print(3)"], "3\n"), cell("#|echo: false\nprint(4)", "4\n"), cell("print(5)", *50*["5\n"]),
             dict(cell_type="markdown", metadata={}, source="#| hide is no directive here")]
    read = BOOK["shown"](dict(cells=cells))["cells"]
    assert [c["source"] for c in read[:-1]] == ["def one(): return 1", "print(3)", "print(4)", "print(5)"]
    assert [c["metadata"].get("tags") for c in read] == [[], ["remove-input"], ["remove-input"], ["scroll-output"], None]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    "The whole book, built in seconds since nothing is executed: page → its HTML."
    missing = [name for name in NEEDED if not find_spec(name)]
    if missing: pytest.skip(f"not installed: {', '.join(missing)}; they come with mgdcr[docs]")
    out = tmp_path_factory.mktemp("book") / "html"
    done = subprocess.run([sys.executable, "-m", "sphinx", "-b", "html", "-d", out.parent / "doctrees", "-c", "docs", "-W",
                           "--keep-going", "-q", ".", out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path: path.read_text(encoding="utf-8") for path in out.rglob("*.html")}


def test_every_link_in_the_book_leads_somewhere(book):
    "Pages, places in them, images, scripts. Links to elsewhere are told (pytest -s), not followed."
    places = {path: set(map(unescape, re.findall(r'\bid="([^"]+)"', text))) for path, text in book.items()}
    broken, elsewhere = [], set()
    for path, text in book.items():
        for tag, link in re.findall(r'<(\w+)\b[^>]*?\s(?:href|src)="([^"]*)"', text):
            url = urlsplit(unescape(link))
            if url.scheme or url.netloc:
                if tag == "a": elsewhere.add(link)
                elif url.scheme != "data": broken.append((path.name, link, "is fetched from elsewhere"))
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.is_file(): broken.append((path.name, link, "is not there"))
            elif url.fragment and target in places and unquote(url.fragment) not in places[target]:
                broken.append((path.name, link, "has no such place"))
    print(*sorted(elsewhere), sep="\n")
    assert not broken


def test_the_book_is_clean(book):
    "No directive is left in it, no formula as typed, and no path of the machine that built it."
    assert any('class="math' in text for text in book.values())
    for path, text in book.items():
        words = unescape(re.sub(r"<[^>]+>", "", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)))
        prose = unescape(re.sub(r"<[^>]+>", "", re.sub(r"<(script|pre|code|title)\b.*?</\1>", "", text, flags=re.DOTALL)))
        assert not re.search(r"^#\|", words, re.MULTILINE), path.name
        assert "$" not in prose, path.name
        assert str(ROOT) not in text, path.name


def test_no_prose_is_lost(book):
    "Each word of a notebook's text, as often as it stands there: to MyST, a line may be a comment."
    def words(text): return Counter(re.findall(r"[A-Za-z]{3,}", text))
    for path, text in book.items():
        if path.parent.name != "nbs": continue
        cells = json.loads((ROOT / "nbs" / f"{path.stem}.ipynb").read_text(encoding="utf-8"))["cells"]
        prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        prose = re.sub(r"\]\([^)]*\)|^```\w*", "", prose, flags=re.MULTILINE)
        assert not words(prose) - words(unescape(re.sub(r"<[^>]+>", "", text[text.index("<article"):]))), path.name
