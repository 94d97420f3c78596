"""What the book asks of Sphinx beyond Jupyter Book: page numbers, pictures that follow the theme, offline files, links to the source."""
import os, re
from html import escape
from pathlib import Path

from docutils import nodes
from sphinx_external_toc.collectors import TocTreeCollectorWithStyles


def number_by_file(app):
    "Number each page as its file is numbered: `03_bpe` is 3, its sections 3.1, its figures 3.1."
    assign = TocTreeCollectorWithStyles.assign_section_numbers

    def assign_section_numbers(self, env):
        changed = assign(self, env)
        for doc, numbers in env.toc_secnumbers.items():
            m = re.search(r'(?:^|/)(\d+)_\w+$', doc)
            if not m: continue
            shift = lambda number: [int(m[1]), *number[1:]]
            env.toc_secnumbers[doc] = {anchor: tuple(shift(n)) for anchor, n in numbers.items()}
            for node in [env.titles[doc], *env.tocs[doc].findall(nodes.reference)]:
                if node.get('secnumber'): node['secnumber'] = shift(node['secnumber'])
        return changed

    TocTreeCollectorWithStyles.assign_section_numbers = assign_section_numbers


def inline_pictures(app, doctree, docname):
    "Put the pages' SVG pictures into the HTML itself, where the theme's colours reach them; the alt text becomes their label."
    if app.builder.format != 'html': return
    for image in list(doctree.findall(nodes.image)):
        path = Path(app.srcdir, image['uri'])
        if path.suffix != '.svg' or 'jupyter_execute' not in path.parts: continue
        svg = path.read_text(encoding='utf-8')
        if 'class="llm-picture"' not in svg: continue
        alt = image.get('alt')
        if not alt: raise ValueError(f'{docname}: a picture has no `#| fig-alt:`: {svg[:200]}')
        image.replace_self(nodes.raw('', svg.replace('<svg ', f'<svg role="img" aria-label="{escape(alt)}" ', 1), format='html'))


def offline(app, config):
    "Serve `_vendor/` without Jupyter Book adding each of its scripts to every page."
    config.html_static_path.append(str(Path(app.confdir)/'_vendor'))


def links_to_source(app, config):
    "On a fork that publishes the book, let the source and launch buttons point to the fork."
    if repo := os.environ.get('GITHUB_REPOSITORY'):
        config.html_theme_options['repository_url'] = f'https://github.com/{repo}'


def thebe_once(app, pagename, templatename, context, doctree):
    "sphinx-thebe 0.3.1 adds the script that holds its constants twice, an error in the browser on every page."
    seen = set()
    for script in list(context.get('script_files', [])):
        body = (getattr(script, 'attributes', None) or {}).get('body') or ''
        if 'THEBE_JS_URL' in body and body in seen: context['script_files'].remove(script)
        seen.add(body)


def setup(app):
    app.connect('config-inited', offline, priority=900)
    app.connect('config-inited', links_to_source, priority=900)
    app.connect('builder-inited', number_by_file, priority=900)
    app.connect('doctree-resolved', inline_pictures)
    app.connect('html-page-context', thebe_once, priority=900)
    return dict(version='1', parallel_read_safe=True, parallel_write_safe=True)
