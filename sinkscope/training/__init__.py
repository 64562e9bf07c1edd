"""One training loop for small sets of parameters beside a frozen model: gates and LoRA alike."""
