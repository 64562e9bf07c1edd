"""Pure tensor functions that run inside the trace, next to the model.

They import ``torch`` and ``math`` only: on a remote run their source travels to a server that has no
sinkscope. Tensors in, tensors out; no model, no state, nothing written in place.
"""
