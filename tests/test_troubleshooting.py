"""docs/troubleshooting.md: the texts that it explains are those that the code says."""

import re
from pathlib import Path

import pytest
import yaml

from fgaif import __version__
from fgaif.config import load_config

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
TEXTS = re.findall(r'^\| "(.+?)" \|', PAGE, re.MULTILINE)
OF_THE_SHELL = ("fgaif: command not found",)


def said() -> str:
    """All strings of the source, with pieces of one text joined as Python joins them."""
    sources = [
        *(
            path
            for package in ("fgaif", "actors", "cluster")
            for path in (ROOT / package).rglob("*.py")
        ),
        ROOT / ".ci" / "install",
    ]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    return re.sub(r'"\s*\\?\n\s*f?"', "", text)


SAID = said()


@pytest.mark.parametrize("text", TEXTS)
def test_the_code_says_what_the_page_explains(text: str) -> None:
    if text in OF_THE_SHELL:
        return
    pieces = [piece.strip() for piece in text.split("…") if len(piece.strip()) > 3]
    assert pieces
    for piece in pieces:
        assert piece in SAID, piece


def test_keys_of_the_cures_exist() -> None:
    for key, value in re.findall(r"`((?:[a-z_]+\.)+[a-z_]+)=([^` ]+)`", PAGE):
        load_config(None, [f"{key}={value.replace('api:NAME', 'model')}"])
    assert len(TEXTS) > 20


def test_the_citation_is_of_this_version() -> None:
    tree = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert tree["version"] == __version__
    assert tree["license"] == "Apache-2.0"
    assert "2404.05046" in tree["preferred-citation"]["url"]
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
