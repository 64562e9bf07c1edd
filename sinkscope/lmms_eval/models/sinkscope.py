"""The model class that lmms-eval loads; what it does is in `sinkscope.lmms_eval.scoring`."""

import os
from typing import Any

from sinkscope.errors import InputError
from sinkscope.lmms_eval.scoring import EditedModel, Prompt

try:
    from lmms_eval.api.instance import GenerationResult  # pyright: ignore[reportMissingImports]
    from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
    from lmms_eval.utils import eval_logger  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise InputError(
        f"Got no lmms-eval ({error}); expected it beside sinkscope, as the page 'Score with lmms-eval' says. "
        "Without it, ss.compare scores the same edits."
    ) from error


class Sinkscope(lmms):
    """Any model of sinkscope under any edit; ``--model_args`` are the arguments of `EditedModel.of`."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        if (many := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise InputError(f"Got WORLD_SIZE={many}; expected one process. Write device_map=auto.")
        given.pop("max_batch_size", None)
        self.model = EditedModel.of(**given)

    def _prompt(self, text: str, visual: Any, doc_id: int, task: str, split: str) -> Prompt:
        return Prompt(task, doc_id, text, lambda: visual(self.task_dict[task][split][doc_id]))

    def generate_until(self, requests: Any) -> list[str]:
        """Answer freely; a request has a context, settings, what gives images, and its document."""
        prompts = [self._prompt(text, *place) for text, _, *place in (r.args for r in requests)]
        return self.model.generate(prompts, [r.args[1] for r in requests])

    def loglikelihood(self, requests: Any) -> list[Any]:
        """Loss and greediness of continuations; a request has one in the place of the settings."""
        prompts, ends = [], []
        for text, end, *place in (request.args for request in requests):
            if len(place) != 4:
                raise InputError("Got options without a prompt (acc_mutual_info); leave that out.")
            _, doc_id, task, split = place
            prompts.append(self._prompt(text, *place))
            ends.append(end(self.task_dict[task][split][doc_id]) if callable(end) else end)
        # lmms-eval 0.7.3 turns a bare tuple into text, which its own scoring cannot read.
        return [GenerationResult(text=one) for one in self.model.score(prompts, ends)]

    def generate_until_multi_round(self, requests: Any) -> list[str]:
        """Refuse tasks of several rounds."""
        raise InputError("Got a task of several rounds (generate_until_multi_round); expected one.")

    def clean(self) -> None:
        """Say and write what the edit did; lmms-eval calls this after the last request."""
        said, idle = self.model.finish()
        (eval_logger.warning if idle else eval_logger.info)(said)
        super().clean()
