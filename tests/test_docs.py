"""Laws over README and docs/: links lead somewhere, citations in the code find their section, README stays short."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def prose(page: Path) -> str:
    """A page without its code, in blocks and in lines."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL))


def links(page: Path) -> list[str]:
    """The targets of a page's links and images that lead to files and headings of this repository."""
    found = re.findall(r"\]\(([^()\s]+)\)", prose(page))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def headings(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"^#+ +(.*\S)", text, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What a link may name after ``#``, by GitHub's rule; no page has two equal headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(page)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    wrong = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    assert wrong == []


def test_links_are_found():
    assert len(links(ROOT / "README.md")) >= 12
    assert sum("#" in target for page in PAGES for target in links(page)) >= 12


def test_readme_is_short_and_leads_to_every_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
    assert {f"docs/{page.name}" for page in DOCS.glob("*.md")} <= set(links(ROOT / "README.md"))


def citations() -> list[tuple[str, str]]:
    """File, and what follows ``docs/reference.md`` there up to the sentence's end."""
    words = ["git", "grep", "-IlF", "docs/reference.md", "--", "arrag_jax", "tests", "configs", ":!tests/test_docs.py"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode > 1:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    return [
        (file, cited)
        for file in found.stdout.splitlines()
        for cited in re.findall(r"docs/reference\.md ([^.;]*)", (ROOT / file).read_text(encoding="utf-8"))
    ]


def test_citations_name_sections_and_quirks_of_the_reference():
    """``docs/reference.md "FAiD" and quirks 5, 15`` cites a section by its heading, and numbered items."""
    sections = {re.sub(r"^\d+\. ", "", heading) for heading in headings(DOCS / "reference.md")}
    text = (DOCS / "reference.md").read_text(encoding="utf-8").partition("## 9. Quirks")[2].partition("\n## ")[0]
    quirks = [int(number) for number in re.findall(r"^(\d+)\. ", text, re.MULTILINE)]
    assert quirks == list(range(1, 27))
    cited = citations()
    assert len(cited) >= 10
    for file, words in cited:
        names = re.findall(r'"([A-Z][^"]*)"', words)
        numbers = re.findall(r"\d+", " ".join(re.findall(r"quirks? ([\d, ]+)", words)))
        assert names or numbers, (file, words)
        assert set(names) <= sections, (file, names)
        assert {int(number) for number in numbers} <= set(quirks), (file, numbers)
