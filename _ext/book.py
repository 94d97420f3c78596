"""What the book asks of Sphinx beyond Jupyter Book: page numbers, pictures that follow the theme, offline files, links to the source, addresses."""
import gc, importlib.util, os, re, sys
from collections import Counter
from copy import deepcopy
from functools import cache
from html import escape
from pathlib import Path

import pybtex.plugin
import pydata_sphinx_theme.toctree as toctree
from docutils import nodes
from pybtex.plugin import register_plugin
from pybtex.style.formatting.unsrt import Style
from pybtex.style.labels import BaseLabelStyle
from sphinx.addnodes import toctree as toctree_node
from sphinx.pycode import ModuleAnalyzer
from sphinx_external_toc.collectors import TocTreeCollectorWithStyles

sys.path.insert(0, str(Path(__file__).parent.parent))
from tools.book import published      # noqa: E402

# A book is millions of small objects, none of them garbage: to look for cycles less often saves a third of the time.
gc.set_threshold(100_000, 50, 1000)
pybtex.plugin.entry_points = cache(pybtex.plugin.entry_points)      # it asks for the same ones, some hundred times


def number_by_file(app):
    "Number each page as its file is named: `03_bpe` is 3, its sections 3.1, its figures 3.1; those of `A_pytorch` A.1."
    assign, changed = TocTreeCollectorWithStyles.assign_section_numbers, lambda before, now: [doc for doc in now if now[doc] != before.get(doc)]

    def assign_section_numbers(self, env):
        before = deepcopy(env.toc_secnumbers)
        assign(self, env)
        for doc, numbers in env.toc_secnumbers.items():
            m = re.search(r'(?:^|/)(\d+)_\w+$', doc)
            if not m: continue
            shift = lambda number: [int(m[1]), *number[1:]]
            env.toc_secnumbers[doc] = {anchor: tuple(shift(n)) for anchor, n in numbers.items()}
            for node in [env.titles[doc], *env.tocs[doc].findall(nodes.reference)]:
                if node.get('secnumber'): node['secnumber'] = shift(node['secnumber'])
        return changed(before, env.toc_secnumbers)      # what is as it was need not be written again

    TocTreeCollectorWithStyles.assign_section_numbers = assign_section_numbers

    figures = TocTreeCollectorWithStyles.assign_figure_numbers

    def assign_figure_numbers(self, env):
        "Pages with a letter are in parts without numbers: their figures and exercises begin with the letter, `A.1`."
        before, whole = deepcopy(env.toc_fignumbers), env.get_doctree
        kept = env.__dict__.setdefault('skeletons', {})      # goes from build to build with all that Sphinx remembers
        def get_doctree(doc):
            if kept.get(doc, [None])[0] != env.all_docs[doc]: kept[doc] = env.all_docs[doc], skeleton(whole(doc), env)
            return kept[doc][1]
        env.get_doctree = get_doctree
        try: figures(self, env)
        finally: del env.get_doctree
        for doc, kinds in env.toc_fignumbers.items():
            if m := re.search(r'(?:^|/)([A-Z])_\w+$', doc):
                for kind, places in kinds.items(): kinds[kind] = {place: (m[1], k) for k, place in enumerate(places, 1)}
        return changed(before, env.toc_fignumbers)

    TocTreeCollectorWithStyles.assign_figure_numbers = assign_figure_numbers


def skeleton(node, env):
    "Sections, lists of pages and what has a number: all that numbering reads. The whole of all pages would take a second in every build."
    out = nodes.section(ids=node['ids']) if isinstance(node, nodes.section) else nodes.container()
    for child in node.children:
        if isinstance(child, toctree_node) or isinstance(child, nodes.Element) and any(d.get_enumerable_node_type(child) for d in env.domains.values()): out += child.deepcopy()
        elif isinstance(child, nodes.Element) and (isinstance(child, nodes.section) or child.children):
            part = skeleton(child, env)
            if part.children or isinstance(child, nodes.section): out += part
    return out


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
        link_to_code(image)
        image.replace_self(nodes.raw('', svg.replace('<svg ', f'<svg role="img" aria-label="{escape(alt)}" ', 1), format='html'))


def link_to_code(image):
    "Let the caption of a picture end with a link to the cell that drew it; a browser unfolds what a link leads into."
    figure = cell = image
    while figure is not None and not isinstance(figure, nodes.figure): figure = figure.parent
    while cell is not None and 'cell' not in cell.get('classes', ()): cell = cell.parent
    if figure is None or cell is None or not figure['ids']: return
    code = next((part for part in cell.findall(nodes.container) if 'cell_input' in part['classes']), None)
    caption = next(iter(figure.findall(nodes.caption)), None)
    if code is None or caption is None: return
    code['ids'].append(name := f"code-{figure['ids'][0]}")
    caption += nodes.raw('', f' <a class="llm-source" href="#{name}">Source</a>', format='html')


def offline(app, config):
    "Serve `_vendor/` without Jupyter Book adding each of its scripts to every page."
    config.html_static_path.append(str(Path(app.confdir)/'_vendor'))


def addresses(app, config):
    "Where the book is published, for the site map, its card and the page for what is not found; a fork that publishes it is its own source."
    if repo := os.environ.get('GITHUB_REPOSITORY'): config.html_theme_options['repository_url'] = f'https://github.com/{repo}'
    host, base = published()
    config.html_baseurl = config.ogp_site_url = f'{host}{base}'
    config.ogp_image = f'{host}{base}_static/card.png'
    config.notfound_urls_prefix = base
    if getattr(config, 'notfound_context', None): config.notfound_context['body'] = config.notfound_context['body'].replace("href='", f"href='{base}")      # it is shown at any depth


def name_toggles():
    "Give the arrows that unfold the table of contents a name for those who hear it."
    fold = toctree.add_collapse_checkboxes

    def named(soup):
        fold(soup)
        for summary in soup.select('summary'):
            if not summary.get_text(strip=True): summary['aria-label'] = 'Show the pages below'

    toctree.add_collapse_checkboxes = named


def works_are_no_list(app, pagename, templatename, context, doctree):
    "docutils says of the works that they are a list, and then that each is an entry of a bibliography, which is no item."
    if 'body' in context: context['body'] = context['body'].replace('<div role="list" class="citation-list">', '<div class="citation-list">')


def thebe_once(app, pagename, templatename, context, doctree):
    "sphinx-thebe 0.3.1 adds the script that holds its constants twice, an error in the browser on every page."
    seen = set()
    for script in list(context.get('script_files', [])):
        body = (getattr(script, 'attributes', None) or {}).get('body') or ''
        if 'THEBE_JS_URL' in body and body in seen: context['script_files'].remove(script)
        seen.add(body)


def find_source(modname: str) -> tuple[str, str]:
    "File and text of a module of the package, which need not be imported, and torch with it, for its page to be found unchanged."
    spec = importlib.util.find_spec(modname)
    return spec.origin, spec.loader.get_source(modname)


class Labels(BaseLabelStyle):
    "Works are called as the pages call them, by author and year."

    def format_labels(self, entries):
        seen = Counter()
        for entry in entries:
            people = [' '.join(map(str, p.rich_last_names)) or str(p) for p in entry.persons.get('author', [])] or [entry.fields.get('title', entry.key)]
            names = people[0] if len(people) == 1 else ' and '.join(people) if len(people) == 2 else f'{people[0]} et al.'
            label = f"{names}, {entry.fields.get('year', 'no year')}"
            seen[label] += 1
            yield label + (f' ({seen[label]})' if seen[label] > 1 else '')


class Works(Style):
    default_label_style, default_sorting_style, done = Labels, 'author_year_title', {}

    def format_entry(self, label, entry, bib_data=None):
        "A work as it is printed; each is asked for several times, and takes its while."
        if (label, entry.key) not in self.done: self.done[label, entry.key] = super().format_entry(label, entry, bib_data)
        return self.done[label, entry.key]


def setup(app):
    register_plugin('pybtex.style.formatting', 'book', Works)
    app.connect('config-inited', offline, priority=900)
    app.connect('config-inited', addresses, priority=10)      # before the extensions that read them
    name_toggles()
    ModuleAnalyzer.get_module_source = staticmethod(find_source)
    app.connect('builder-inited', number_by_file, priority=900)
    app.connect('doctree-resolved', inline_pictures)
    app.connect('html-page-context', thebe_once, priority=900)
    app.connect('html-page-context', works_are_no_list)
    return dict(version='1', parallel_read_safe=True, parallel_write_safe=True)
