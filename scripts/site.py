"""Build the documentation site: `python scripts/site.py [--repository URL]`, or `make site`.

The pages in docs/ link to each other and to files of the repository with relative links, which work on GitHub. This
script copies them to build/site/docs, together with the pages in the repository's root, and turns each link that leaves
the site into a link to the repository (or into plain text if its address is not known). Zensical then builds
build/site/html and checks the links between pages; this script checks all others.
Invariant: a link to a file that does not exist fails the build.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
STAGE = ROOT / "build" / "site" / "docs"
ROOT_PAGES = {name: STAGE / "project" / name.lower() for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]*)(#[^()\s]*)?\)")
FENCE = re.compile(r"^(```|    )")


def main() -> int:
    """Stage the pages and run Zensical; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repository", default=_repository(), help="URL of the repository, for links to its files")
    repository = parser.parse_args().repository
    shutil.rmtree(STAGE.parent, ignore_errors=True)
    pages = staged_pages()
    broken: list[str] = []
    for source, target in pages.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(rewritten(source, pages, repository, broken), encoding="utf-8")
    shutil.copytree(DOCS / "images", STAGE / "images")
    if broken:
        print("Links to files that do not exist:", *broken, sep="\n  ", file=sys.stderr)
        return 1
    zensical = str(Path(sys.executable).with_name("zensical"))
    return subprocess.run([zensical, "build", "--strict", "--clean"], cwd=ROOT, check=False).returncode


def staged_pages() -> dict[Path, Path]:
    """Each page of the site and its copy."""
    pages = {path: STAGE / path.relative_to(DOCS) for path in sorted(DOCS.rglob("*.md"))}
    return pages | {ROOT / name: copy for name, copy in ROOT_PAGES.items() if (ROOT / name).is_file()}


def rewritten(source: Path, pages: dict[Path, Path], repository: str, broken: list[str]) -> str:
    """The text of a page with its links as the site needs them; adds to `broken` those that lead nowhere."""

    def link(match: re.Match[str]) -> str:
        image, text, address, fragment = match[1], match[2], match[3], match[4] or ""
        if not address or re.match(r"[a-z]+:", address):
            return match[0]
        target = Path(os.path.normpath(source.parent / address))
        if not target.exists():
            broken.append(f"{source.relative_to(ROOT)}: {address}")
            return match[0]
        if target in pages:
            return f"{image}[{text}]({os.path.relpath(pages[target], pages[source].parent)}{fragment})"
        if target.is_relative_to(DOCS / "images"):
            at = STAGE / target.relative_to(DOCS)
            return f"{image}[{text}]({os.path.relpath(at, pages[source].parent)})"
        return f"[{text}]({repository}/blob/main/{target.relative_to(ROOT)}{fragment})" if repository else text

    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    fenced = False
    for at, line in enumerate(lines):
        fenced ^= line.startswith("```")
        if not fenced and not FENCE.match(line):
            lines[at] = LINK.sub(link, line)
    return "".join(lines)


def _repository() -> str:
    """The address of the repository on the machine of GitHub Actions; elsewhere it is not known."""
    name = os.environ.get("GITHUB_REPOSITORY", "")
    return f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{name}" if name else ""


if __name__ == "__main__":
    raise SystemExit(main())
