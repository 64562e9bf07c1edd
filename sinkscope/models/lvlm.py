"""LVLM: a vision-language model, what it is made of, and everything one can ask it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from sinkscope.anatomy.attention_call import kernel_of
from sinkscope.anatomy.block_sum import NoBranch
from sinkscope.anatomy.context import Context
from sinkscope.anatomy.discovery import read_anatomy
from sinkscope.anatomy.holding import device_of
from sinkscope.anatomy.towers import Anatomy
from sinkscope.checks import check_flags
from sinkscope.errors import CheckpointError, InputError, ModelError
from sinkscope.interventions.application import (
    Edited,
    check_beside,
    check_interventions,
    check_reach,
    require_effects,
    with_kl,
)
from sinkscope.models import inputs as preparing
from sinkscope.models import requests as checking
from sinkscope.models import runs as runner
from sinkscope.models import wrapping
from sinkscope.models.inputs import Sample
from sinkscope.models.runs import Generation, Run, finish_run
from sinkscope.models.wrapping import ByName, Wrapped
from sinkscope.protocols import Intervention, Probe

if TYPE_CHECKING:
    from sinkscope.models.report import Report


class LVLM:
    """A vision-language model with named sites.

    Every pass runs in evaluation mode, whatever mode the modules are in, and leaves them in theirs. So
    no dropout acts, that of a fresh adapter included, and gradient checkpointing is off.

    Args:
        module: A ``transformers`` image-text-to-text model.
        processor: Its processor, or None: then `prepare` takes ready inputs only.
        verify: Whether to run two short passes now that prove the anatomy (needs a
            processor and real weights).

    Raises:
        ModelError: If the model is no LVLM that sinkscope can read.
    """

    def __init__(self, module: nn.Module, processor: Any = None, *, verify: bool = True) -> None:
        check_flags(verify=verify)
        self._anatomy = read_anatomy(module)
        self._module: Any = module
        self._processor = processor
        self._local = Wrapped(module)
        self._remote: Wrapped | ByName | None = None
        self._always_remote: bool | str = False
        self._name = str(getattr(module, "name_or_path", "") or type(module).__name__)
        self._verified = False
        self._not_added: Mapping[tuple[str, int], NoBranch] = {}
        if verify and processor is not None and not self._weightless:
            from sinkscope.models.proofs import verify_anatomy

            self._not_added = verify_anatomy(self)
            self._anatomy = self._anatomy.without(self._not_added)
            self._verified = True

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        remote: bool | str = False,
        trust_remote_code: bool = False,
        verify: bool = True,
    ) -> LVLM:
        """Load a model and its processor from a hub repository or a folder.

        Args:
            name: Repository id or folder.
            revision: Branch, tag or commit.
            dtype: ``"auto"``, ``"bfloat16"``, ``"float32"`` or a torch dtype.
            device_map: Passed to ``transformers``, such as ``"auto"``.
            attn_implementation: ``"sdpa"``, ``"eager"``, ... or None for the model's default.
            quantization_config: Passed to ``transformers``: one of its configs, such as
                ``BitsAndBytesConfig(load_in_8bit=True)``, or the same as a dict.
            remote: True to run on NDIF: only the architecture is built here, no weights.
                ``"local"`` takes the same path without a server, with the weights here.
            trust_remote_code: Never implied; True, and nothing that counts as true, runs code from
                the repository.
            verify: See the class.

        Returns:
            The model in evaluation mode.

        Raises:
            InputError: If ``trust_remote_code`` or ``verify`` is neither True nor False.
            CheckpointError: If the checkpoint is missing, incomplete or corrupt, or an option is of
                another type.
            ModelError: If it is no LVLM that sinkscope can read.
        """
        from sinkscope.models.loading import load, load_remote

        check_flags(verify=verify)  # before the weights are read
        options = {
            "revision": revision,
            "dtype": dtype,
            "device_map": device_map,
            "attn_implementation": attn_implementation,
            "quantization_config": quantization_config,
            "trust_remote_code": trust_remote_code,
        }
        if not isinstance(name, (str, Path)):
            raise CheckpointError(
                f"Got a checkpoint of type {type(name).__name__}; expected a repository id or a "
                "folder. For a model you already hold write ss.LVLM(model, processor)."
            )
        folder = Path(name).expanduser()
        where = str(folder) if folder.is_dir() else str(name)
        if checking.check_remote(remote) in (False, "local"):
            module, processor = load(where, options)
            lvlm = cls(module, processor, verify=verify)
        else:
            wrapped = load_remote(where, options)
            lvlm = cls(wrapping.module_of(wrapped), wrapped.processor, verify=False)
            lvlm._remote = ByName(wrapped)
        lvlm._always_remote, lvlm._name = remote, str(name)
        return lvlm

    @property
    def anatomy(self) -> Anatomy:
        """Where the model keeps its parts, under its present attention kernel."""
        config, known = self._module.config, self._anatomy
        kernels = (kernel_of(config.vision_config), kernel_of(config.get_text_config()))
        if kernels != (known.vision.kernel, known.language.kernel):
            self._anatomy = read_anatomy(self._module).without(self._not_added)
        return self._anatomy

    @property
    def verified(self) -> bool:
        """Whether a forward pass has proven the anatomy when the model was loaded."""
        return self._verified

    @property
    def module(self) -> nn.Module:
        """The ``transformers`` model itself."""
        return self._module

    @property
    def processor(self) -> Any:
        """The processor, or None."""
        return self._processor

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer, or None."""
        return getattr(self._processor, "tokenizer", None)

    @property
    def name(self) -> str:
        """Repository id, folder, or class name."""
        return self._name

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return device_of(self._module.get_input_embeddings())

    def __repr__(self) -> str:
        a = self._anatomy
        return (
            f"LVLM({self._name!r}, {a.family.name}: vision {a.vision.n_layers} x {a.vision.d_model}, "
            f"language {a.language.n_layers} x {a.language.d_model})"
        )

    def prepare(
        self,
        images: Any = None,
        text: Any = None,
        *,
        inputs: Mapping[str, Any] | None = None,
        rendered: bool = False,
    ) -> Sample:
        """Images and text as model inputs, with a map of every token.

        Args:
            images: One image, or a list. With one text all images belong to it; with a list of
                texts there is one entry (an image or a list of images) per text, or one image for
                all. PIL images, paths, URLs, bytes, arrays or tensors; each is read as people see
                it, upright and opaque (`sinkscope.models.pictures.open_image`).
            text: A question or chat messages, or a list of them: one batch row each, left-padded. A
                question goes through the model's chat template, its images first. ``<image>``, or
                the model's own image token, alone on the first or last line changes nothing; inside
                of words it is refused. Messages may hold their pictures; those that do not take
                ``images`` in order.
            inputs: Instead of both, the processor output you made yourself.
            rendered: Whether texts are finished prompts, with one image token per image: they are
                taken as they are.

        Returns:
            The sample.

        Raises:
            InputError: If something is missing or does not fit.
        """
        return preparing.make_sample(
            self._module, self._processor, self.anatomy, images, text, inputs, rendered=rendered
        )

    def run(
        self,
        sample: Sample,
        probes: Sequence[Probe] = (),
        interventions: Sequence[Intervention] = (),
        *,
        logits: Literal["all", "last"] | None = None,
        remote: bool | str | None = None,
        kl: bool = False,
        grad: bool = False,
    ) -> Run:
        """One forward pass with any number of probes and interventions.

        Sites are visited in forward order, and probes see what the model really uses after all
        edits of a site. Edits of states apply in list order. Those of one attention call apply in
        stages, whatever their place in the list: keys, logits, weights, values; list order decides
        inside a stage.

        Args:
            sample: From `prepare`.
            probes: The probes; their results are found by the probe object.
            interventions: The interventions; what they did stands in ``run.effects``.
            logits: ``"all"`` or ``"last"``; None is ``"all"`` here and ``"last"`` on remote runs.
            remote: True for NDIF, ``"local"`` for the same path without a server; None for what
                the model was loaded with.
            kl: Whether to run once more without interventions and put the KL divergence of the
                next token, ``KL(unedited || edited)`` in nats, into the effects.
            grad: Whether the logits keep their graph, so that a loss reaches what an intervention
                learns (a gate's parameters). They stay on the model's device then. Runs here only;
                to train a gate, `train_lsg` is cheaper.

        Returns:
            Logits, results and effects.

        Raises:
            ProbeError: If a probe does not fit the model or the sample.
            InterventionError: If an intervention does not fit; its child NoEffectError if it
                touched nothing.
            NonFiniteError: If live logits hold NaN.
        """
        checking.check_sample(sample, self.anatomy.fingerprint)
        check_flags(kl=kl, grad=grad)
        asked, edits = checking.check_probes(probes), check_interventions(interventions)
        check_beside(edits, asked)
        where = checking.check_grad(grad, self._where(remote))
        keep_all = checking.check_logits(logits, "last" if where else "all")
        context = Context(self.anatomy, sample.tokens)
        plan = self._plan(asked, edits, context)
        last = None if keep_all else sample.tokens.last
        raw = runner.run_plan(self._traced(where), self._placed(sample), plan, last, where, grad)
        out = finish_run(raw, asked, context, edits, keep_all=keep_all)
        require_effects(edits, [out.effects])
        if not (kl and edits):
            return out
        plain = self.run(sample, logits="last", remote=remote)
        return with_kl(out, plain, sample.tokens.last)

    def generate(
        self,
        sample: Sample,
        probes: Sequence[Probe] = (),
        interventions: Sequence[Intervention] = (),
        *,
        max_new_tokens: int | None = None,
        remote: bool | str | None = None,
        **options: Any,
    ) -> Generation:
        """Generate an answer with the KV cache, probing every forward pass.

        The answer is the one of ``model.generate(**sample.inputs, **options)``: what is not given
        here is as the model's ``generation_config`` says, and then as ``transformers`` has it (greedy, 20
        tokens). A config that samples does so here; ``torch.manual_seed(0)`` before the call repeats
        it, and ``do_sample=False`` turns it off.

        Probes of the vision tower have a result at the prompt only. At a decode step there is one
        query, and keys are the prompt's and those generated so far.

        Args:
            sample: From `prepare`.
            probes: The probes.
            interventions: The interventions, each at the steps it names.
            max_new_tokens: Upper bound on the answer's length, or None.
            remote: See `run`.
            options: Further settings of ``transformers``' ``generate``, with one query per row: no
                beams, no several answers, no guessed tokens. A static cache is replaced by one that
                grows, which changes no number.

        Returns:
            Sequences, text and one `Run` per forward pass.

        Raises:
            ProbeError: If a probe does not fit the model or the sample.
            InputError: If options, or the model's ``generation_config``, ask for what cannot be probed.
            InterventionError: If an intervention does not fit; its child NoEffectError if it
                touched nothing at any step.
        """
        checking.check_sample(sample, self.anatomy.fingerprint)
        asked, edits = checking.check_probes(probes), check_interventions(interventions)
        check_beside(edits, asked)
        where = self._where(remote)
        defaults = getattr(self._module, "generation_config", None)
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        checking.check_generation(sample, options, defaults)
        later = [probe for probe in asked if probe.tower == "language"]
        plans = (
            self._plan(asked, edits, Context(self.anatomy, sample.tokens)),
            self._plan(later, edits, Context(self.anatomy, sample.tokens, step=1)),
        )
        options |= checking.growing_cache(options, defaults)
        raws, sequences = runner.generate_plan(
            self._traced(where), self._placed(sample), plans, options, where
        )
        prompt, steps = sample.tokens.ids.shape[1], []
        ends = checking.setting("eos_token_id", options, defaults)
        for step, raw in enumerate(raws):
            ended = checking.ended_rows(sequences, prompt, step, ends)
            context = Context(self.anatomy, sample.tokens, step, ended)
            steps.append(finish_run(raw, later if step else asked, context, edits))
        require_effects(edits, [step.effects for step in steps])
        text = None
        if self.tokenizer is not None:
            answers = sequences[:, prompt:]
            text = tuple(self.tokenizer.batch_decode(answers, skip_special_tokens=True))
        return Generation(sequences, text, tuple(steps))

    @contextmanager
    def edited(self, interventions: Sequence[Intervention]) -> Iterator[Edited]:
        """The same model with interventions on, until the block ends.

        ::

            with lvlm.edited([ss.MaskKeys("image:0", layers=[4])]) as edited:
                edited.generate(sample)

        Args:
            interventions: The interventions.

        Yields:
            A model with `run` and `generate`.

        Raises:
            InterventionError: If something else came.
        """
        edited = Edited(self, check_interventions(interventions))
        try:
            yield edited
        finally:
            edited.close()

    def report(self) -> Report:
        """Anatomy and, per probe, whether it is exact, approximate or unavailable, and why.

        Returns:
            A `sinkscope.models.report.Report`; print it, or show it in a notebook.
        """
        from sinkscope.models.report import make_report

        return make_report(self)

    @property
    def _weightless(self) -> bool:
        """Whether only the architecture is here."""
        return self.device.type == "meta"

    def _plan(
        self, probes: Sequence[Probe], edits: Sequence[Intervention], context: Context
    ) -> runner.Plan:
        """The plan of all probes and interventions, which must be made for this model."""
        for it in edits:
            check_fits = getattr(it, "check_fits", None)
            if check_fits is not None:
                check_fits(self)
        reads = [(slot, read) for slot, probe in enumerate(probes) for read in probe.reads(context)]
        changes = []
        for slot, it in enumerate(edits):
            mine = it.edits(context)
            check_reach(it, mine, context.anatomy.feed_layers)
            changes += [(slot, edit) for edit in mine]
        return runner.make_plan(context.anatomy, reads, changes)

    def _where(self, remote: bool | str | None) -> bool | str:
        """Where to run: what was asked, or what the model was loaded with."""
        where = checking.check_remote(self._always_remote if remote is None else remote)
        offloaded = next(self._module.parameters()).device.type == "meta"
        checking.check_weights(where, weightless=self._weightless, offloaded=offloaded)
        return where

    def _traced(self, where: bool | str) -> Wrapped | ByName:
        """The wrapped model for a local or remote run."""
        if not where:
            return self._local
        if self._remote is None:
            if self._processor is None:
                raise InputError(
                    "Got remote=... for a model without a processor; expected one. Write "
                    "ss.LVLM(model, processor)."
                )
            # nnsight sets padding on the tokenizer it is given.
            own = copy.deepcopy(self._processor)
            self._remote = Wrapped(self._module, partial(wrapping.wrap_remote, processor=own))
        if where != "local":
            wrapping.check_reachable(self._remote.model, self._name)
        return self._remote

    def _placed(self, sample: Sample) -> dict[str, Any]:
        """The inputs on the model's device; where there are no weights they stay where they are."""
        device = None if self._weightless else self.device
        return {
            name: value.to(device) if isinstance(value, Tensor) and device else value
            for name, value in sample.inputs.items()
        }

    def __iter__(self) -> Iterator[Any]:
        raise ModelError(
            "Got iteration over an LVLM, which has no order; expected a use of its parts. They are in "
            "lvlm.anatomy: write lvlm.module.get_submodule(path) for the module at one of its paths."
        )
