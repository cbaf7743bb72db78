"""Pages from templates: text is escaped, scripts run only if their hash is the page's own, nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from dit_ds.errors import UserError

# sets the function that draws a plot; the interpreter of expressions (`ast`) needs no eval, which the policy forbids
_EXPORT = "window.vegaEmbed = vegaEmbed;"


@cache
def templates() -> jinja2.Environment:
    """The package's templates. Values are escaped, names that are not given are errors."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("dit_ds.pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def asset(name: str) -> str:
    """A style sheet or script that lies beside the templates."""
    return (files("dit_ds.pages") / "templates" / name).read_text(encoding="utf-8")


def render_report(**values: Any) -> str:
    """The report's page, whole: styles, scripts and plots' data within.

    Args:
        values: what the template names.
    Raises:
        UserError: what draws plots is not installed.
    """
    scripts = [plot_library(), asset("report.js")]
    policy = "; ".join(
        [
            "default-src 'none'",
            "script-src " + " ".join(_hash(script) for script in scripts),
            "style-src 'unsafe-inline'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    return (
        templates()
        .get_template("report.html")
        .render(
            policy=policy,
            style=Markup(asset("base.css") + asset("report.css")),
            scripts=[_inline(script) for script in scripts],
            **values,
        )
    )


def plot_library() -> str:
    """Vega-Lite as a script that sets `vegaEmbed`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import vl_convert
    except ImportError:
        raise UserError("report draws with Vega-Lite, which is not installed: pip install 'dit-ds[report]'") from None
    return vl_convert.javascript_bundle(_EXPORT)


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _inline(script: str) -> Markup:
    """A script of ours or of a library, to stand within `<script>`, where nothing can be escaped."""
    if "</script" in script.lower() or "<!--" in script:
        raise AssertionError("the script would end its element")
    return Markup(script)
