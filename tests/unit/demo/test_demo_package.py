"""What is installed of the demo: its bundle and images, and not the code that trains it."""

import tomllib
from pathlib import Path

import pytest

import captioner

PACKAGE = Path(captioner.__file__).parent
INSTALLED = [
    "demo/bundle/bundle.json",
    "demo/images/scene-0004.jpg",
    "cluster/dashboard/grafana.json",
    "gallery/page.js",
]


def test_the_demo_is_installed_without_its_training():
    setuptools = pytest.importorskip("setuptools")
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = setuptools.find_packages(str(PACKAGE.parent), **settings["packages"]["find"])
    assert {"captioner", "captioner.demo", "captioner.decoding.cuda"} <= set(packages)
    assert not [
        package
        for package in packages
        if not package.startswith("captioner") or package.startswith("captioner.demo.training")
    ]
    data = {path for pattern in settings["package-data"]["captioner"] for path in PACKAGE.glob(pattern)}
    assert {PACKAGE / name for name in INSTALLED} <= data
