"""Hooks of MkDocs: files of the repository become pages of the site. An extension of Griffe: docstrings as Markdown."""

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("*.md", "LICENSE", "bench/README.md", "bench/results/*")
ROLE = re.compile(r":\w+:`~?([^`]+)`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what stands outside docs/ under its path in the repository. README.md is the home page."""
    for path in (path for pattern in SHOWN for path in sorted(ROOT.glob(pattern))):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links as they are in the repository, to where the site has the same files."""
    return markdown.replace("](../../", "](").replace("](docs/pages/", "](")


class Docstrings(Extension):
    """Roles of Sphinx, such as :func:`name`, become names in code font."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
