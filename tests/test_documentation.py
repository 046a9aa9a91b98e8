"""The documentation builds, fetches nothing, and its configuration reference is conf/."""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _hooks():
    spec = importlib.util.spec_from_file_location("coz_docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built in this process as `mkdocs build --strict` does."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install -e '.[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    target = tmp_path_factory.mktemp("site")
    warnings = []

    class Keep(logging.Handler):
        def emit(self, record):
            warnings.append(record.getMessage())

    keeper = Keep(logging.WARNING)
    logging.getLogger("mkdocs").addHandler(keeper)
    try:
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(target), strict=True))
    finally:
        logging.getLogger("mkdocs").removeHandler(keeper)
    assert not warnings
    return target


def test_every_page_is_in_the_navigation(site):
    pages = {file.stem for file in (ROOT / "docs").glob("*.md")} | {"configuration"}
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in pages:
        assert (site / f"{page}.html").is_file(), page
        assert f" {page}.md" in navigation, f"{page}.md is in no menu of mkdocs.yml"


def test_the_pages_load_nothing_from_outside(site):
    loads = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=["']?(https?:)?//[^"'>\s]+""")
    for file in site.glob("*.html"):
        found = [match.group(0) for match in loads.finditer(file.read_text()) if 'rel="canonical"' not in match.group(0)]
        assert not found, (file.name, found)


def test_the_examples_stand_in_the_page_as_they_run(site):
    text = (site / "extend.html").read_text()
    for word in ("class", "Unsharp", "Palette", "ColorCritic", "Brevity", "Sharpness", "list_csv"):
        assert word in text, word
    assert "--8&lt;--" not in text


def test_the_reference_holds_every_file_of_conf():
    hooks = _hooks()
    text = hooks.reference()
    entries = {file.stem for file in hooks.CONF.glob("*.yaml")}
    assert entries == set(hooks.COMMANDS), "name the command of each entry point in docs/hooks.py"
    for file in hooks.CONF.glob("*/*.yaml"):
        if file.parent.name != "hydra":
            assert f"#### {file.parent.name}={file.stem}\n" in text
    assert "\nhydra:\n" not in text
    assert "latent_overlap: 32" in text


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"`((?:docs|data|conf|examples)/[\w./-]+)`", text)
    assert targets
    for target in targets:
        assert target.startswith("http") or (ROOT / target).exists(), target
