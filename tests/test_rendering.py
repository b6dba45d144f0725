"""Hostile text in every value of a template, as a reader of HTML and of Markdown takes it."""

from pathlib import Path

import pytest
from jinja2 import UndefinedError
from markdown_it import MarkdownIt

from vlm_composer.rendering import html, load_templates, markdown

HOSTILE = (
    "<script>alert(1)</script>",
    "![x](http://evil.example/x.png)",
    "[x](javascript:alert(1)) http://evil.example www.evil.example a@evil.example",
    "a | b `c` ``d`` \\| \\",
    "# a\n\n- b\n> c\r\n---\n1. d",
    "*a* _b_ **c** ~~d~~ &lt; &#60; $x$ @someone #1",
    "`",
    " ` `` ` ",
    " padded ",
    "\x1b[31m\x00\u202e",
)


def rendered(folder: Path, template: str, value: object, prepare=html) -> str:
    (folder / "page.jinja").write_text(template)
    return load_templates(folder, prepare).get_template("page.jinja").render(value=value)


def test_html_is_escaped(tmp_path):
    text = '<a href="x">\'&\x00\ud800'
    safe = "&lt;a href=&#34;x&#34;&gt;&#39;&amp;�?"
    assert rendered(tmp_path, "{{ value }}", text) == safe
    assert rendered(tmp_path, "{{ value|bdi }}", text) == f"<bdi>{safe}</bdi>"
    macro = "{% macro cell(x) %}<td>{{ x }}</td>{% endmacro %}{{ cell(value) }}"
    assert rendered(tmp_path, macro, text) == f"<td>{safe}</td>"
    with pytest.raises(UndefinedError, match="other"):
        rendered(tmp_path, "{{ other }}", text)


def tokens_of(text: str) -> list[tuple[str, str]]:
    """Types and contents of what a reader of GitHub's Markdown finds in lines and cells."""
    blocks = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    return [
        (token.type, token.content)
        for block in blocks
        for token in (block.children or [block])
        if token.content or token.children is None
    ]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_markdown_shows_a_text_as_it_is(tmp_path, text):
    def found(template: str, kind: str) -> list[str]:
        page = rendered(tmp_path, template, text, markdown)
        return ["".join(c for k, c in tokens_of(line) if k == kind) for line in [page]]

    shown = text.replace("\r", r"\r").replace("\n", "⏎")
    shown = shown.replace("\x1b", r"\x1b").replace("\x00", r"\x00").replace("\u202e", r"\u202e")
    assert found("# {{ value }}\n", "text") == [shown.strip()]
    assert found("Asks {{ value|code }}: so.\n", "code_inline") == [shown]
    table = "| a | b |\n| --- | --- |\n| {{ value|cell }} | {{ value }} |\n"
    assert found(table, "code_inline") == [shown]
    page = rendered(tmp_path, table, text, markdown)
    kinds = {kind for kind, _ in tokens_of(page)}
    assert not kinds & {"html_inline", "html_block", "image", "link_open", "s_open", "em_open"}
    assert page.count("\n") == 3
