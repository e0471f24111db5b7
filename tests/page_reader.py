"""Parses pages for the tests, and opens pages in a browser."""

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

VOID = {'meta', 'img', 'br', 'link', 'input', 'hr', 'path', 'use', 'rect'}
BROWSER = next(
    (path for name in ('chromium', 'chromium-browser', 'google-chrome') if (path := shutil.which(name))), None
)


class Reader(HTMLParser):
    """Collects every tag with its attributes and the text, and fails at a tag that is not closed in its place."""

    def __init__(self, text):
        super().__init__()
        self.source, self.tags, self.open, self.text = text, [], [], ''
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {'style', 'svg'} & set(self.open):
            self.text += f' {data}'

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def sections(self):
        return [attributes['id'] for attributes in self.all('section') if 'id' in attributes]

    @property
    def visible_text(self):
        return ' '.join(self.text.split())

    def check_stands_by_itself(self) -> None:
        """Checks that the page refers to nothing outside itself, and that every figure has an alternative text."""
        assert not self.all('script') and not self.all('link')
        assert not re.findall(r'url\((?!#)|@import', self.source)
        for _, attributes in self.tags:
            for name in ('src', 'href', 'xlink:href', 'srcset', 'data', 'action'):
                assert re.match(r'data:image/png;base64,|#|https://arxiv\.org/abs/', attributes.get(name) or '#')
        policy = next(
            meta['content'] for meta in self.all('meta') if meta.get('http-equiv') == 'Content-Security-Policy'
        )
        assert policy.startswith("default-src 'none'; img-src data:;")
        assert self.all('svg') and all(attributes['role'] == 'img' for attributes in self.all('svg'))
        texts = [attributes['alt'] for attributes in self.all('img')]
        texts += [attributes['aria-label'] for attributes in self.all('svg')]
        assert all(len(text) > 20 for text in texts)
        identities = [attributes['id'] for _, attributes in self.tags if 'id' in attributes]
        assert len(identities) == len(set(identities))
        used = {use['xlink:href'][1:] for use in self.all('use')} | set(re.findall(r'url\(#(.*?)\)', self.source))
        assert used and used <= set(identities)


def look(pages: dict[str, str], question: str, directory: Path) -> str:
    """Opens pages in a browser, each as wide as a phone, and evaluates an expression about them.

    Args:
        pages: Texts of the pages by name.
        question: JavaScript expression of `pages`, an object of the pages' windows by name.
        directory: Empty directory.
    """
    frames = ''.join(
        f'<iframe id="{name}" width="390" height="844" style="border:0" srcdoc="{html.escape(text)}"></iframe>'
        for name, text in pages.items()
    )
    script = (
        '<script>onload = () => { const pages = Object.fromEntries([...document.querySelectorAll("iframe")].map('
        f'f => [f.id, f.contentWindow])); document.title = JSON.stringify({question}) }}</script>'
    )
    (directory / 'frame.html').write_text(f'<!doctype html><title></title>{frames}{script}')
    flags = ['--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={directory}/profile', '--dump-dom']
    command = [BROWSER, *flags, (directory / 'frame.html').as_uri()]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return html.unescape(re.search(r'<title>(.*?)</title>', output).group(1))
