"""Build the book from the stored outputs and check it: `python -m tools.book`, or with `--changed` only what has changed, unchecked.

A warning of the build is an error. Then every page must be there, every link lead somewhere, nothing be loaded from
outside, and every picture be described; the exit code is 1 and the faults are listed if not.
"""
import os, re, shutil, subprocess, sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parent.parent
LOADS = {'script': 'src', 'img': 'src', 'link': 'href', 'iframe': 'src', 'source': 'src', 'video': 'src', 'audio': 'src', 'object': 'data', 'embed': 'src'}
def published() -> tuple[str, str]:
    "Where the book is published, the host and the folder; on a fork that publishes it, the fork's."
    if repo := os.environ.get('GITHUB_REPOSITORY'):
        owner, name = repo.split('/')
        return f'https://{owner}.github.io', f'/{name}/'
    settings = ConfigParser()
    settings.read(ROOT/'settings.ini')
    return settings['DEFAULT']['doc_host'], settings['DEFAULT']['doc_baseurl'] + '/'


HOST, BASE = published()
OUTSIDE = re.compile(r'(?:url\(|@import)\s*["\']?(?:https?:)?//[^)"\']+')


class PageReader(HTMLParser):
    "Collects what a page loads, where it links, which anchors it has, and its pictures without a description."

    def __init__(self, html: str):
        super().__init__()
        self.loads, self.links, self.anchors, self.faults, self.text, self.quiet, self.style = [], [], set(), [], [], 0, False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        if tag in ('script', 'style'): self.quiet += 1
        self.style = tag == 'style'
        if 'id' in a: self.anchors.add(a['id'])
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        url = a.get(LOADS.get(tag, ''))
        if url and not (tag == 'link' and a.get('rel') in ('canonical', 'next', 'prev', 'search', 'index', 'author')): self.loads.append(url)
        self.loads += [part.split()[0] for part in (a.get('srcset') or '').split(',') if part.strip()]
        self.faults += [f'loads {found} from outside' for found in OUTSIDE.findall(a.get('style') or '')]
        if tag == 'img' and not a.get('alt'): self.faults.append(f"picture without alt text: {url}")
        if tag == 'svg' and 'llm-picture' in (a.get('class') or '') and not a.get('aria-label'): self.faults.append('drawing without a description')

    def handle_endtag(self, tag):
        if tag in ('script', 'style'): self.quiet -= 1

    def handle_data(self, data):
        self.faults += [f'loads {found} from outside' for found in OUTSIDE.findall(data) if self.style]
        if not self.quiet: self.text.append(data)


def pages_of_toc(toc: dict) -> set[str]:
    "Names of all pages that the table of contents lists."
    found, todo = {toc['root']}, [toc]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            if 'file' in item: found.add(item['file'])
            todo += item.values()
        elif isinstance(item, list): todo += item
    return found


def check(book: Path) -> list[str]:
    "All faults of the book, one line each."
    listed = pages_of_toc(yaml.safe_load((ROOT/'_toc.yml').read_text(encoding='utf-8')))
    pages = {p.relative_to(book).as_posix(): PageReader(p.read_text(encoding='utf-8')) for p in sorted(book.rglob('*.html')) if '_static' not in p.parts}
    faults = [f'{name}: listed in _toc.yml and not built' for name in sorted(listed) if f'{name}.html' not in pages]
    for name, page in pages.items():
        faults += [f'{name}: {fault}' for fault in page.faults]
        if re.search(r'^\s*#\s?\|', ''.join(page.text), re.M): faults.append(f'{name}: a directive of nbdev shows')
        for url in page.loads + page.links:
            parts = urlsplit(url)
            if parts.scheme == 'data' or url == '#': continue
            if parts.scheme or parts.netloc:
                if url in page.loads: faults.append(f'{name}: loads {url} from outside')
                continue
            inside = parts.path.removeprefix(BASE)      # the page for what is not found is shown at any depth, so it links from the top
            target = book/unquote(inside) if inside != parts.path else (book/name).parent/unquote(parts.path) if parts.path else book/name
            if target.is_dir(): target /= 'index.html'
            if not target.exists(): faults.append(f'{name}: dead link {url}')
            elif parts.fragment and target.suffix == '.html':
                there = pages.get(target.resolve().relative_to(book.resolve()).as_posix())
                if there and unquote(parts.fragment) not in there.anchors: faults.append(f'{name}: no such place on the page: {url}')
    for style in book.rglob('*.css'):
        for found in OUTSIDE.findall(style.read_text(encoding='utf-8', errors='replace')):
            faults.append(f'{style.relative_to(book)}: loads {found} from outside')
    return faults


# jsonschema would compile the grammar of web addresses, for two seconds and for nothing
START = "import sys; sys.modules['rfc3987_syntax'] = None; from jupyter_book.cli.main import main; main()"


def main():
    changed = sys.argv[1:] == ['--changed']
    if sys.argv[1:] and not changed: sys.exit(f'unknown: {" ".join(sys.argv[1:])}. Say nothing for the whole book, or --changed.')
    # all pages anew, because an unchanged page keeps its warnings to itself, nor may a page of a former build hide a dead link
    if not changed: shutil.rmtree(ROOT/'_build'/'html', ignore_errors=True)
    start = 'import gc; gc.disable(); ' * changed + START      # the few pages that have changed leave little behind
    build = [sys.executable, '-c', start, 'build', '.', *([] if changed else ['--all']), '-W', '-n', '--keep-going']
    code = subprocess.run(build, cwd=ROOT).returncode
    if code or changed: sys.exit(code)
    if faults := check(ROOT/'_build'/'html'): sys.exit('\n'.join([f'{len(faults)} faults in the book:', *faults]))
    print('The book is in _build/html/nbs/index.html: every page built, every link and picture checked, nothing loaded from outside.')
    print('`make serve` (or `python -m tools.serve`) opens it.')


if __name__ == '__main__': main()
