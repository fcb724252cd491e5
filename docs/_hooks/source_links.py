"""Links from the pages to files of the repository.

A page links to a file as `../kernels/segments.py`, which a repository's host follows; `#name` after it is a
function or class of that file. The site gets a page with the source of each file that is linked, and the
link leads to it. A file or a name that does not exist fails the build.
"""

from __future__ import annotations

import ast
import html
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename

log = get_plugin_logger("source_links")
LINK = re.compile(r"(?<=\]\()(\.\./[^)\s#]+)(#[^)\s]+)?(?=\))")


def repository_path(page: str, target: str) -> str | None:
    """The path from the repository's root of what `page` (from docs/) links to; None inside docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def definitions(path: str, text: str) -> dict[str, int]:
    """The line of each function, class and method, the last as `Class.method`; Python only."""
    if not path.endswith(".py"):
        return {}
    lines: dict[str, int] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                lines[prefix + child.name] = child.lineno  # of overloads the last, which has the body
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(text), "")
    return lines


def source_page(path: str, text: str) -> str:
    """A page with the highlighted file; definitions have anchors of their names."""
    formatter = HtmlFormatter(nowrap=True)
    lexer = get_lexer_for_filename(path, stripnl=False)
    lines = highlight(text, lexer, formatter).splitlines()
    for name, number in definitions(path, text).items():
        lines[number - 1] = f'<span id="{html.escape(name)}"></span>{lines[number - 1]}'
    code = "\n".join(lines)
    return (
        f'---\ntitle: "{path}"\nsearch:\n  exclude: true\n---\n\n# `{path}`\n\n'
        f'<div class="highlight"><pre><code>{code}\n</code></pre></div>\n'
    )


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.docs_dir).parent
    for page in list(files.documentation_pages()):
        for found in LINK.finditer(page.content_string):
            path = repository_path(page.src_uri, found[1])
            if path is None or path.endswith(".md"):
                continue
            source = root / path
            if not source.is_file():
                log.warning(f"{page.src_uri}: no such file: {path}")
                continue
            uri = f"source/{path}.md"
            if files.get_file_from_path(uri) is None:
                content = source_page(path, source.read_text())
                made = File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV)
                files.append(made)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def rewritten(found: re.Match[str]) -> str:
        path = repository_path(page.file.src_uri, found[1])
        uri = f"source/{path}.md"
        if path is None or files.get_file_from_path(uri) is None:
            return found[0]
        here = posixpath.dirname(page.file.src_uri) or "."
        return posixpath.relpath(uri, here) + (found[2] or "")

    return LINK.sub(rewritten, markdown)
