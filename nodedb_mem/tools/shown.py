"""How the command shows what others have named: paths, and errors that speak of them."""

from __future__ import annotations


def shown(text: str) -> str:
    """Return `text` with an escape for each character that a terminal, a font or an encoding would not show.

    Escaped are control characters, line ends, and the bytes of a name that are no UTF-8.
    """
    return text if text.isprintable() else "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
