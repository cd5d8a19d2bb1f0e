"""Fix the links of the source pages.

sphinx.ext.viewcode assumes that all objects of a module are documented under one package. Here objects of one module
are documented under several, such as ``kornia_tinyvit.TinyViTConfig`` and
``kornia_tinyvit.config.resolve_window_sizes``. Its index also lists ``builtins``, which has no page.
"""

from __future__ import annotations

import re

INDEX = "_modules/index"
BACK = re.compile(r'(<div class="viewcode-block" id="([^"]*)">\n)<a class="viewcode-back" href="[^"]*">(.*?)</a>')


def fix_links(app, pagename, templatename, context, doctree) -> None:
    if pagename == INDEX:
        context["body"] = re.sub(r'<li><a href="builtins.html">builtins</a></li>\n', "", context["body"])
    elif pagename.startswith("_modules/"):
        module = pagename.removeprefix("_modules/").split("/")
        packages = [".".join(module[:length]) for length in range(len(module), 0, -1)]

        def link(match: re.Match[str]) -> str:
            before, name, text = match.groups()
            documented = app.env.domains.python_domain.objects
            entry = next((documented[f"{each}.{name}"] for each in packages if f"{each}.{name}" in documented), None)
            if entry is None:
                return before
            target = app.builder.get_relative_uri(pagename, entry.docname)
            return f'{before}<a class="viewcode-back" href="{target}#{entry.node_id}">{text}</a>'

        context["body"] = BACK.sub(link, context["body"])


def setup(app):
    app.connect("html-page-context", fix_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
