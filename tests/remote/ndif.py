"""What NDIF allowed when its source was last public (2026-02); read by the stand-in server too."""

ALLOWED = frozenset(
    {"builtins", "torch", "collections", "numpy", "math", "einops", "typing", "operator", "enum"}
)
"""Packages that shipped code may import."""
ALLOWED_IN_PAYLOAD = ALLOWED | {"pickle", "cloudpickle", "copyreg", "nnsight", "_operator"}
"""Packages that a payload may name while it is unpickled."""
ABSENT_BUILTINS = frozenset(
    {"bin", "breakpoint", "compile", "exec", "exit", "help", "license", "locals", "open", "quit"}
)
"""Builtins that are removed while shipped code runs."""
