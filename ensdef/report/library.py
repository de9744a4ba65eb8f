"""The charting library as one script, out of an installed package: nothing is fetched."""

from __future__ import annotations

from functools import cache

from ensdef.errors import UsageError


@cache
def chart_library() -> str:
    """Vega, Vega-Lite and Vega-Embed as JavaScript that may stand inside a ``script`` element.

    Raises:
        UsageError: the package that brings them is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise UsageError("charts need vl-convert-python; install it with: pip install 'ensdef[report]'") from error
    return embeddable(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def embeddable(script: str) -> str:
    """A script that no HTML parser ends or reads in another way: the same values, written with escapes."""
    return script.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "\\x3c!--")
