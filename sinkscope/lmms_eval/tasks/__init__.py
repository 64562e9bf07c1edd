"""No tasks: lmms-eval wants this package to be there, for the YAML files of tasks of a plug-in."""
