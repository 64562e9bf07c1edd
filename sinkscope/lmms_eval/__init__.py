"""The plug-in for lmms-eval: ``LMMS_EVAL_PLUGINS=sinkscope.lmms_eval python -m lmms_eval --model sinkscope``.

lmms-eval imports `models` for the names of its models, and looks for a package `tasks`; where sinkscope is
installed, it also finds `manifest` by itself. Only `models.sinkscope` needs lmms-eval.
"""

from typing import Any


def manifest() -> Any:
    """What lmms-eval asks of the entry point ``lmms_eval.models``: where the class of the model is."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest("sinkscope", "sinkscope.lmms_eval.models.sinkscope.Sinkscope")
