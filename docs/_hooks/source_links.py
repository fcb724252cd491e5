"""Links from the pages to files of the repository outside of docs/.

A page links to a file as `../kernels/segments.py`, which a repository's host follows too; `#name` after it is
a function or class of that file, `Class.name` a method. The site gets a page with the source of each file
that is linked (Markdown is rendered, pictures are copied), and the link leads to it. A file or a name that
does not exist fails the strict build.
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
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

log = get_plugin_logger("source_links")
LINK = re.compile(r"(?<=\]\()(?!\w+:|[#/])([^)\s#]+)(#[^)\s]+)?(?=\))")
FOLDER = "source"  # of the site, for these pages
SOURCE = "SOURCE-OF-THE-FILE"  # stands in a page for the highlighted file
PICTURES = (".png", ".svg", ".jpg")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.docs_dir).parent
    todo = [(f"docs/{page.src_uri}", page.content_string) for page in files.documentation_pages()]
    while todo:
        page, text = todo.pop()
        for path in {linked(page, found[1]) for found in LINK.finditer(text)}:
            uri = site_uri(path)
            if path.startswith("docs/") or files.get_file_from_path(uri) is not None:
                continue
            source = root / path
            if not source.is_file():
                log.warning(f"{page}: no such file: {path}")
                continue
            where = {"inclusion": InclusionLevel.NOT_IN_NAV}
            if source.suffix in PICTURES:
                made = File.generated(config, uri, abs_src_path=str(source), **where)
            elif source.suffix == ".md":
                todo.append((path, source.read_text()))
                made = File.generated(config, uri, content=without_metadata(source.read_text()), **where)
            else:
                content = source_page(path, source.read_text())
                made = File.generated(config, uri, content=content, **where)
            files.append(made)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    path = uri.removeprefix(f"{FOLDER}/") if uri.startswith(f"{FOLDER}/") else f"docs/{uri}"
    if uri.startswith(f"{FOLDER}/") and not Path(config.docs_dir).parent.joinpath(path).is_file():
        return markdown  # of source, where brackets are no links

    def rewritten(found: re.Match[str]) -> str:
        target = linked(path, found[1])
        if path.startswith("docs/") and target.startswith("docs/"):
            return found[0]
        return posixpath.relpath(site_uri(target), posixpath.dirname(uri) or ".") + (found[2] or "")

    return LINK.sub(rewritten, markdown)


def linked(page: str, target: str) -> str:
    """What `page` links to; both from the repository's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), target))


def site_uri(path: str) -> str:
    """The source of the site's page, or file, for a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{FOLDER}/{path}" + ("" if path.endswith((".md", *PICTURES)) else ".md")


def without_metadata(markdown: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.S)


def definitions(path: str, text: str) -> dict[str, int]:
    """The line of each function, class and method, the last as `Class.method`; Python only."""
    if not path.endswith(".py"):
        return {}
    lines: dict[str, int] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                lines[prefix + child.name] = child.lineno  # of overloads the last, which has the body
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(text), "")
    return lines


def source_page(path: str, text: str) -> str:
    """A page with anchors of the definitions' names; on_page_content() puts the source in their place."""
    anchors = "".join(f'<span id="{html.escape(name)}"></span>' for name in definitions(path, text))
    head = f'---\ntitle: "{path}"\nhide: [navigation, toc]\nsearch:\n  exclude: true\n---\n'
    return f"{head}\n# `{path}`\n\n{anchors}{SOURCE}\n"


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if SOURCE not in content or not page.file.src_uri.startswith(f"{FOLDER}/"):
        return content
    path = page.file.src_uri.removeprefix(f"{FOLDER}/").removesuffix(".md")
    code = highlighted(path, Path(config.docs_dir).parent.joinpath(path).read_text())
    return content[: content.index("</h1>") + 5] + code


def highlighted(path: str, text: str) -> str:
    """The file's source as HTML; each definition's line has the anchor of its name."""
    try:
        lexer = get_lexer_for_filename(path, stripnl=False)
    except ClassNotFound:
        lexer = TextLexer(stripnl=False)
    lines = highlight(text, lexer, HtmlFormatter(nowrap=True)).splitlines()
    anchors = {number: f' id="{html.escape(name)}"' for name, number in definitions(path, text).items()}
    # A span for each line: the theme lays them out as rows.
    code = "".join(f"<span{anchors.get(i, '')}>{line}\n</span>" for i, line in enumerate(lines, 1))
    return f'<div class="highlight"><pre><span></span><code>{code}</code></pre></div>'
