"""What leaves this machine says no more of its folders than their names."""

from __future__ import annotations

import re

_ABSOLUTE = re.compile(
    r"""(?<![\w:/.~])               # not inside a relative path or a URL
        (?:~|[A-Za-z]:|\\\\|(?=/))  # home, Windows drive, network share, or root
        (?:[\\/]+[^\\/"'`\s,;|<>]+)*
        [\\/]+([^\\/"'`\s,;|<>]+)   # the last part, which stays
    """,
    re.VERBOSE,
)
_QUOTED = re.compile(r"""(["'])(?:~|[A-Za-z]:(?=[\\/])|\\\\|(?=/))[^"'\n]*[\\/]+([^"'\\/\n]*)\1""")


def hide_paths(text: str) -> str:
    """Absolute paths cut down to their last part: `/home/ann/photos` becomes `.../photos`."""
    return _ABSOLUTE.sub(r".../\1", _QUOTED.sub(r"\1.../\2\1", text))
