"""The declarations of the public header, translated for Cython."""

from __future__ import annotations

import keyword
import re

_NAME = r"[A-Za-z_]\w*"


# Outside the marked block.
_MACROS = (
    "const char *NDM_VERSION",
    "const int NDM_VERSION_NUMBER",
    "const int NDM_ABI_VERSION",
    "int NDM_CHECK_ABI()",
)


def pxd(declarations: str) -> str:
    """Translate the header's marked block into a .pxd file.

    Raises
    ------
    ValueError
        The block holds a kind of declaration that this function does not know.
    """
    declarations = re.sub(r"/\*.*?\*/", " ", declarations, flags=re.DOTALL)
    text = " ".join(line for line in declarations.splitlines() if not line.startswith("#define"))
    text = " ".join(text.split())
    lines = ["# Made from nodedb_mem.h, which is the manual, when the package was built.", "# cython: language_level=3"]
    lines += ["from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t", ""]
    lines += ['cdef extern from "nodedb_mem.h" nogil:']
    body = list(_MACROS)
    body += [f"const int64_t {name}" for name in re.findall(rf"^#define ({_NAME}) ", declarations, re.MULTILINE)]
    for statement in re.findall(r"(?:[^;{]|\{[^}]*\})+;", text):
        body += _translate(statement.strip().removesuffix(";").strip())
    return "\n".join([*lines, *(f"    {line}" for line in body), ""])


def _translate(statement: str) -> list[str]:
    if match := re.fullmatch(rf"typedef struct ({_NAME}) \1", statement):
        return [f"ctypedef struct {match[1]}:", "    pass"]
    if match := re.fullmatch(rf"enum((?: {_NAME})?) \{{(.*)\}}", statement):
        names = [item.split("=")[0].strip() for item in match[2].split(",") if item.strip()]
        return [f"cdef enum{match[1]}:", *(f"    {name}" for name in names)]
    if match := re.fullmatch(rf"typedef struct(?: {_NAME})? \{{(.*)\}} ({_NAME})", statement):
        return [
            f"ctypedef struct {match[2]}:",
            *(f"    {item.strip()}" for item in match[1].split(";") if item.strip()),
        ]
    if re.fullmatch(rf"[\w\s*]+?\b{_NAME}\([^()]*\)", statement):
        # Cython knows no const behind a star, and the C compiler accepts the pointer without it. Names of parameters
        # don't matter, but must not be Python's own words.
        statement = re.sub(rf"\b({'|'.join(keyword.kwlist)})\b", r"\1_", statement)
        return [re.sub(r"\*\s*const\b\s*", "*", statement).replace("(void)", "()")]
    raise ValueError(f"cannot translate for Cython: {statement}")
