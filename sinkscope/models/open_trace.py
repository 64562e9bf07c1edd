"""A trace of the user's own: nnsight's block on our inputs, with sites by our names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sinkscope.anatomy.towers import Anatomy
from sinkscope.checks import check_choice
from sinkscope.errors import InterventionError, LayerError, ModelError, ProbeError
from sinkscope.kernels import walk
from sinkscope.models.runs import step_at
from sinkscope.models.wrapping import Wrapped
from sinkscope.sites import Site, Tower


class OpenTrace:
    """What runs the block of one trace: nnsight's model is lent its modules for that time only.

    Args:
        model: The wrapped model.
        anatomy: Its anatomy.
        grad: Whether the pass keeps a graph.
    """

    def __init__(self, model: Wrapped, anatomy: Anatomy, grad: bool = False) -> None:
        self._model, self._anatomy, self._grad = model, anatomy, grad
        self._root: Any = None
        self._tracer: Any = None
        self._outputs: set[str] = set()
        self._copies: dict[Site, tuple[Tensor, int]] = {}

    def __call__(self, tracer: Any) -> None:
        """Run the block that nnsight has captured, as one of its backends.

        Raises:
            InterventionError: If the block changed a value in place that the model does not see.
        """
        try:
            with self._model.on(None, self._outputs, self._grad) as self._root:
                self._tracer = tracer
                tracer.execute(tracer.info.code)
            for site, (value, version) in self._copies.items():
                if value._version != version:
                    raise InterventionError(
                        f"Got an edit in place of {site}, where the model multiplies by a factor and "
                        "uses another tensor; expected lvlm.set_site"
                        f"({site.tower!r}, {site.layer}, {site.name!r}, new)."
                    )
        finally:
            self._root = self._tracer = None
            self._copies = {}

    @property
    def root(self) -> Any:
        """The nnsight model, whose modules are lent until the block ends.

        Raises:
            ProbeError: If the block has ended, or not begun.
        """
        if self._root is None:
            raise ProbeError(
                "Got a site or nnsight's model outside of a trace; expected it inside the block. Write "
                "with lvlm.trace(sample): states = lvlm.site('language', 0, 'resid_post').save()."
            )
        return self._root

    def _read(self, tower: Tower, layer: int, name: str, **asked: Any) -> tuple[Site, Any, bool]:
        """A site that this model has, its value, and whether that is a copy; ``asked`` edits it."""
        root, site = self.root, Site(tower, name, layer)
        if tower == "projector":
            check_choice((0,), error=LayerError, layer=layer)
        else:
            self._anatomy.tower(tower).layers(layer)
        step = step_at(self._anatomy, site, **asked)
        if not step["path"]:
            raise ModelError(
                f"Got {site}, but that MLP has no last linear map; expected another site."
            )
        if step["how"] == "output":
            self._outputs.add(step["path"])
        value = walk.read_site(root, self._tracer, step, {}, {})
        return site, value, bool(step.get("factors"))

    def site(self, tower: Tower, layer: int, name: str) -> Any:
        """The value at a site: see `LVLM.site`."""
        site, value, copied = self._read(tower, layer, name)
        if copied:
            self._copies[site] = (value, value._version)
        return value

    def set_site(self, tower: Tower, layer: int, name: str, value: Any) -> None:
        """Replace the value at a site: see `LVLM.set_site`."""
        if name == "attention":
            raise InterventionError(
                "Got set_site for the attention call, which is no tensor; expected an edit in place of "
                "what lvlm.site gives, or an intervention such as ss.ScaleKeys."
            )

        def replaced(old: Tensor, state: Any) -> tuple[Tensor, None]:
            given = getattr(value, "shape", None), getattr(value, "dtype", None)
            if not torch.is_tensor(value) or given != (old.shape, old.dtype):
                raise InterventionError(
                    f"Got {type(value).__name__} of shape {given[0]} and dtype {given[1]} for {name!r}; "
                    f"expected a tensor {tuple(old.shape)} of {old.dtype}. Write new.to(old.dtype)."
                )
            return value.to(old.device), None

        site, _, _ = self._read(tower, layer, name, edits=[(None, replaced, {})])
        self._copies.pop(site, None)
