"""The book: README, the notebooks with the outputs they were committed with, and the results. `make docs` builds it, with Sphinx."""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The sidebar, in reading order: chapters and patterns of their pages. A notebook in none of them fails tests/test_docs.py.
CHAPTERS = {
    "Start": ["nbs/index", "nbs/tutorial_patient", "nbs/choosing", "nbs/reconstruct", "nbs/tutorial_cohort"],
    "The physics": ["nbs/0[0-5]_*"],
    "The digital heart and its scanner": ["nbs/0[6-9]_*", "nbs/10_*"],
    "Data": ["nbs/11_*", "nbs/prepare_data", "data_prep/README"],
    "The priors": ["nbs/1[2-6]_*", "nbs/21_*"],
    "Labels": ["nbs/1[7-9]_*", "nbs/20_*"],
    "The reconstruction": ["nbs/2[2-4]_*"],
    "Evaluation": ["nbs/2[7-9]_*", "nbs/evaluate", "nbs/ablation"],
    "Jobs and training": ["nbs/2[56]_*", "nbs/train_*"],
    "Results": ["results/README", "results/record/*/*"],
}


def pages(chapter: str) -> list[str]:
    "A chapter's pages in order, without their suffixes."
    files = [p for pattern in CHAPTERS[chapter] for p in sorted(ROOT.glob(pattern + ".*")) if p.suffix in (".md", ".ipynb")]
    return [p.relative_to(ROOT).with_suffix("").as_posix() for p in files]


def entry(page: str) -> str:
    "A line of the sidebar: the page's own title, or another where that would not tell it from its siblings'."
    *_, folder, name = page.split("/")
    title = "Overview" if page == "nbs/index" else None
    if "/record/" in page: title = folder if name == "reconstruct" else f"{folder}, {name}"
    return f"{title} <{page}>" if title else page


def contents() -> str:
    "All chapters, as Sphinx reads them."
    return "\n".join("\n".join(["```{toctree}", ":hidden:", f":caption: {chapter}", *map(entry, pages(chapter)), "```"])
                     for chapter in CHAPTERS)


def shown(notebook: dict) -> dict:
    "The notebook as nbdev's directives want it read, and without them; an output of many lines scrolls in its own box."
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines()
            directives = {line[2:].strip() for line in lines if line.startswith("#|")}
            cell["source"] = "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")
            if "hide" in directives or not cell["source"]: continue
            printed = "".join(part for output in cell["outputs"] for part in output.get("text", ""))
            cell["metadata"]["tags"] = (["remove-input"] if directives & {"hide_input", "echo: false"} else []) + \
                                       (["scroll-output"] if printed.count("\n") > 40 else [])
        cells.append(cell)
    return notebook | {"cells": cells}


def read(app, page, source):
    "Called by Sphinx with the text of each page, in a list of one."
    if page == root_doc: source[0] += "\n" + contents()
    if app.env.doc2path(page).suffix == ".ipynb": source[0] = json.dumps(shown(json.loads(source[0])))
    # what ran in nbs/ has links that start from there
    if "/record/" in page: source[0] = re.sub(r"\]\((\w+\.ipynb)", r"](/nbs/\1", source[0])


def finish(app, exception):
    "Called by Sphinx at the end: the name under which a browser looks for the front page."
    if not exception: (Path(app.outdir)/"index.html").write_text(f'<meta http-equiv="refresh" content="0; url={root_doc}.html">\n')


def setup(app):
    import mathjax    # of django-static-mathjax
    html_static_path.append(str(Path(mathjax.__file__).parent/"static/mathjax/es5"/mathjax_path))
    app.connect("source-read", read)
    app.connect("build-finished", finish)


project = html_title = "MGDCR"
copyright = "the MGDCR developers"
extensions = ["myst_nb"]
root_doc = "README"
include_patterns = ["README.md", "data_prep/README.md", "results/README.md", "nbs/*.ipynb", "results/record/*/*.ipynb"]
exclude_patterns = [p.name for p in ROOT.iterdir() if p.is_dir() and p.name not in ("nbs", "data_prep", "results")]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"    # of outputs: with tables and formulas
myst_disable_syntax = ["myst_line_comment"]    # a line may begin with a per cent sign
myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
mathjax_path = "tex-svg.js"    # the one that needs neither fonts nor other files
html_theme = "furo"
html_static_path = ["book.css"]
html_css_files = ["book.css"]
html_copy_source = False
smartquotes = False
