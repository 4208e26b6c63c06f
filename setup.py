"""Packaging. Names, versions and requirements stand in settings.ini, once; this file only hands them to setuptools."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

root = Path(__file__).resolve().parent
config = ConfigParser()
config.read(root / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def requirements(key: str) -> list[str]:
    "The requirements listed under `key`, one a line."
    return [line.strip() for line in cfg[key].splitlines() if line.strip()]


def minor(key: str) -> int:
    "The y of the Python version 3.y under `key`."
    return int(cfg[key].split(".")[1])


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license=cfg["license"].upper(),
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        *(f"Programming Language :: Python :: 3.{y}" for y in range(minor("min_python"), minor("max_python") + 1)),
    ],
    python_requires=f">={cfg['min_python']},<3.{minor('max_python') + 1}",
    packages=[cfg["lib_name"]],
    package_data={cfg["lib_name"]: ["splits.json", "weights/*"]},
    install_requires=requirements("requirements"),
    extras_require={extra: requirements(f"{extra}_requirements") for extra in ("cluster", "dev", "dicom", "docs")},
    # papermill imports this before it reads its arguments, which lets `papermill nbs/reconstruct.ipynb -p subject X`
    # do without an output path (see nbs/25_jobs.ipynb)
    entry_points={"papermill.engine": ["mgdcr = mgdcr.jobs:Engine"]},
    zip_safe=False,
)
