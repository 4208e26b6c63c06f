"""The project as a whole: packaging, what importing costs and needs, tidy notebooks, and that README is true."""
import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from pyflakes.checker import Checker
from pyflakes.messages import UndefinedName

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ConfigParser()
CONFIG.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = CONFIG["DEFAULT"]
MODULES = sorted(p for p in (ROOT / "mgdcr").glob("*.py") if p.stem != "_modidx")
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
NBDEV = {"nbdev", "fastcore", "execnb", "ghapi", "fastgit"}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def lines(text):
    "The lines that say something."
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def names(requirements):
    return {Requirement(r).name.lower() for r in requirements}


def python(code, cwd=ROOT):
    "Run `code` in a fresh interpreter and return what it prints."
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(path):
    "The top-level names that a module imports, wherever in it."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


# Packaging

def test_requirements_txt_mirrors_settings():
    assert lines((ROOT / "requirements.txt").read_text()) == lines(SETTINGS["requirements"])


def test_nbdev_is_only_in_dev():
    assert NBDEV <= names(lines(SETTINGS["dev_requirements"]))
    assert not NBDEV & (names(lines(SETTINGS["requirements"])) | names(lines(SETTINGS["dicom_requirements"])))


def test_constraints_pin_every_requirement_within_its_range():
    pins = {r.name.lower(): r for r in map(Requirement, lines((ROOT / "constraints.txt").read_text()))}
    assert all(re.fullmatch(r"==[0-9a-z.]+", str(pin.specifier)) and not pin.url for pin in pins.values())
    assert str(pins["torch"].specifier) == "==2.13.0"
    for key in ("requirements", "cluster_requirements", "dev_requirements", "dicom_requirements", "docs_requirements"):
        for wanted in map(Requirement, lines(SETTINGS[key])):
            pin = pins[wanted.name.lower()]
            assert wanted.specifier.contains(str(pin.specifier).removeprefix("==")), f"{pin} is outside {wanted}"


def test_setup_reads_settings_without_pkg_resources():
    source = (ROOT / "setup.py").read_text()
    assert "configparser" in source and "pkg_resources" not in source
    assert CONFIG.getboolean("DEFAULT", "update_pyproject") is False
    assert SETTINGS["allowed_cell_metadata_keys"].split() == ["tags"]    # else nbdev_clean deletes papermill's tag


def test_the_installed_package_is_this_one():
    try:
        installed = importlib.metadata.metadata("mgdcr")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mgdcr is not installed here: the package is used from its folder")
    assert installed["Version"] == SETTINGS["version"]
    declared = {str(Requirement(r)) for r in installed.get_all("Requires-Dist") if "extra" not in r}
    assert declared == {str(Requirement(r)) for r in lines(SETTINGS["requirements"])}
    engines = importlib.metadata.entry_points(group="papermill.engine")
    assert [e.value for e in engines if e.name == "mgdcr"] == ["mgdcr.jobs:Engine"]


def test_installed_requirements_agree_with_each_other():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    if "No module named pip" in done.stderr:
        pytest.skip("this environment has no pip")
    assert done.returncode == 0, done.stdout


def test_citation_names_diffae():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cff)
    assert cff["version"] == SETTINGS["version"] and cff["license"] == "MIT"
    assert any("Diffusion Autoencoders" in r["title"] and r["year"] == 2022 for r in cff["references"])
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


# What importing costs and needs

def test_import_is_light():
    heavy = "{'torch', 'monai', 'numpy', 'scipy', 'matplotlib', 'pydicom', 'nibabel', 'pandas', 'skimage'}"
    assert python(f"import sys, mgdcr; print(mgdcr.__version__, {heavy} & set(sys.modules))").split() == [
        SETTINGS["version"], "set()"]


@pytest.mark.parametrize("before", [
    "", "import mgdcr.reconstruct", "from mgdcr import reconstruct; import mgdcr.reconstruct"])
def test_reconstruct_can_be_called(before):
    "A module has the same name as the function: `from mgdcr import reconstruct` works whichever was imported first."
    assert "no method 'magic'" in python(f"""{before}
from mgdcr import Reconstruction, Study, load_subject, reconstruct
try: reconstruct(Study("nobody", {{}}), method="magic")
except ValueError as refusal: print(refusal)
""")


def test_unknown_attribute_is_an_attribute_error():
    assert python("import mgdcr; print(hasattr(mgdcr, 'nothing'), 'Study' in dir(mgdcr))").split() == ["False", "True"]


def test_every_module_imports_without_nbdev():
    "As in an environment that has none of nbdev's packages, nor torchvision."
    block = f"""
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {NBDEV | {'torchvision'}}: raise ModuleNotFoundError('blocked: ' + name, name=name)
sys.meta_path.insert(0, Block())
for name in {[p.stem for p in MODULES if p.stem != '__init__']}: importlib.import_module('mgdcr.' + name)
print('all', len(sys.argv))
"""
    assert python(block).startswith("all")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_are_declared(path):
    "What a module imports is the standard library, the package itself, or a declared requirement."
    packages = importlib.metadata.packages_distributions()
    declared = names(lines(SETTINGS["requirements"]))
    # these come with papermill and jupyterlab by their very nature: their notebooks' format, and their configuration
    declared |= {"nbformat", "nbclient", "pyyaml", "click", "ipython"}
    if path.stem == "batch": declared |= names(lines(SETTINGS["cluster_requirements"]))  # imported where it is asked for
    for name in set(imported(path)) - set(sys.stdlib_module_names) - {"mgdcr"}:
        assert name not in NBDEV and name != "torchvision", f"{path.name} imports {name}"
        assert {d.lower() for d in packages.get(name, [name])} & declared, f"{path.name} imports {name}, undeclared"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_a_module_knows_every_name_it_uses(path):
    "A notebook's later cells may define or import what the exported ones need: the module would lack it."
    found = Checker(ast.parse(path.read_text(encoding="utf-8")), path.name).messages
    assert not [str(message) for message in found if isinstance(message, UndefinedName)]


def test_nothing_asks_for_torchvision():
    texts = [ROOT / n for n in ("settings.ini", "requirements.txt", "constraints.txt", "Makefile", "pyproject.toml")]
    assert not [p.name for p in [*texts, *MODULES, *NOTEBOOKS] if "torchvision" in p.read_text(encoding="utf-8")]


# Notebooks

@pytest.mark.parametrize("path", [p for p in MODULES if p.stem != "__init__"], ids=lambda p: p.stem)
def test_module_comes_from_a_notebook(path):
    source = re.search(r"AUTOGENERATED! DO NOT EDIT! File to edit: (\S+)\.\n", path.read_text(encoding="utf-8"))
    assert source, f"{path.name} is not exported from a notebook"
    assert (path.parent / source[1]).resolve() in NOTEBOOKS


def printed(cells):
    "All that the cells say in words; pictures are base64, in which anything may occur."
    outputs = [o for c in cells for o in c.get("outputs", [])]
    texts = [o.get("text", "") for o in outputs]
    texts += [v for o in outputs for k, v in o.get("data", {}).items() if k.startswith("text/")]
    return "\n".join("".join(text) for text in texts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_reads_as_documentation(path):
    "Small, titled, executed without errors or warnings, and silent about where, when and by whom it was run."
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    cells = notebook["cells"]
    assert len(text.encode()) < 500_000
    if re.match(r"\d", path.name) or path.stem == "index":
        first = "".join(cells[0]["source"]).splitlines()
        assert first[0].startswith("# ") and any(line.startswith("> ") for line in first), "no title and one-line quote"
        outputs = [o for c in cells for o in c.get("outputs", [])]
        assert outputs, "committed without having been executed"
        assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
        # a widget's identifier is random, and no git host can show it
        assert not [o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
    assert set(notebook["metadata"]) <= {"kernelspec"}
    assert {key for c in cells for key in c["metadata"]} <= {"tags"}
    path_of_a_machine = r"(?<![\w.<>~])/(home|root|Users|work|tmp|opt|var)/\w+"
    assert not re.findall(path_of_a_machine, printed(cells))


# README

def code_blocks(language):
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL))


def recipe(target):
    "What `make target` runs on a fresh machine."
    # a make that runs these tests hands its own variables on: a reader's make has none
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "VENV", "PYTHON")}
    done = subprocess.run(["make", "--dry-run", "--always-make", target], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(" --quiet", "")


def test_readme_commands_are_what_make_does():
    shell = lines(code_blocks("bash"))
    targets = [line.split()[1] for line in shell if line.startswith("make ")]
    assert targets == ["demo", "test"]
    said = " ".join(README.split())
    for target in targets:
        for line in recipe(target).splitlines():
            command = line.removeprefix("OMP_NUM_THREADS=1 ")
            if not command.startswith(("touch ", "echo")):
                assert command in said, f"make {target} runs {command!r}, of which README says nothing"


def test_readme_links_lead_somewhere():
    for document in [ROOT / "README.md", *ROOT.glob("*/README.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (document.parent / link).exists(), f"{document.relative_to(ROOT)} links to {link}: not there"


def test_readme_and_index_show_every_library_notebook():
    "The same table in both, in the notebooks' order."
    index = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))
    text = "\n".join("".join(cell["source"]) for cell in index["cells"])
    rows = re.findall(r"^\| \[(\w+)\]\(nbs/\1\.ipynb\) \| (.*) \|$", README, re.MULTILINE)
    assert rows == re.findall(r"^\| \[(\w+)\]\(\1\.ipynb\) \| (.*) \|$", text, re.MULTILINE)
    assert [name for name, _ in rows] == [p.stem for p in NOTEBOOKS if re.match(r"\d", p.name)]


def test_readme_tells_the_parameters_and_methods_there_are():
    "Each parameter of the main job, with its default, and each method."
    notebook = json.loads((ROOT / "nbs/reconstruct.ipynb").read_text(encoding="utf-8"))
    cell = next(c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", []))
    defaults = {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse("".join(cell["source"])).body}
    told = dict(re.findall(r"^\| `(\w+)` \| `?(.*?)`? ?\| .* \|$", README, re.MULTILINE))
    assert told == {name: str(value) for name, value in defaults.items()}
    from mgdcr.inverse import METHODS
    row = next(line for line in README.splitlines() if line.startswith("| `method`"))
    assert set(re.findall(r"`(\w+)`", row.rsplit("|", 2)[1])) == set(METHODS)


def test_no_module_defines_a_name_twice():
    import ast
    for path in sorted((ROOT / "mgdcr").glob("*.py")):
        names = [node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        assert len(names) == len(set(names)), (path.name, sorted({n for n in names if names.count(n) > 1}))
