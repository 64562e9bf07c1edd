"""The models of the plug-in: the name after ``--model``, which is also a module here, and its class."""

AVAILABLE_MODELS = {"sinkscope": "Sinkscope"}
