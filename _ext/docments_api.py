"""Show fastcore docments (`x: int, # what x is`) as the parameter list of autodoc's pages."""
import inspect
from dataclasses import is_dataclass

from fastcore.docments import docments


def add_parameters(app, what, name, obj, options, lines):
    if what not in ('function', 'method', 'class'): return
    function = obj.__init__ if inspect.isclass(obj) and '__init__' in vars(obj) and not is_dataclass(obj) else obj
    try: found = docments(function, full=True, returns=True)
    except (TypeError, ValueError, OSError): return      # no source
    fields = []
    for key, doc in found.items():
        text = ' '.join((doc.docment or '').split())
        if key in ('self', 'cls') or not text: continue
        fields.append(f':returns: {text}' if key == 'return' else f':param {key}: {text}')
    lines += ['', *fields, ''] if fields else []


def setup(app):
    app.connect('autodoc-process-docstring', add_parameters, priority=400)      # before napoleon
    return dict(version='1', parallel_read_safe=True, parallel_write_safe=True)
