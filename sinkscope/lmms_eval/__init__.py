"""The plug-in for lmms-eval: ``LMMS_EVAL_PLUGINS=sinkscope.lmms_eval python -m lmms_eval --model sinkscope``.

lmms-eval imports `models` for the names of its models, and looks for a package `tasks`. Only
`models.sinkscope` needs lmms-eval; what a model answers and notes is `scoring`, which does not.
"""
