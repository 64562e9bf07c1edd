"""LVLM: a vision-language model, what it is made of, and everything one can ask it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sinkscope.anatomy.attention_call import kernel_of
from sinkscope.anatomy.context import Context
from sinkscope.anatomy.discovery import read_anatomy
from sinkscope.anatomy.towers import Anatomy
from sinkscope.checks import check_choice, check_path, typed
from sinkscope.errors import InputError, ModelError, ProbeError, SinkscopeError
from sinkscope.interventions import application
from sinkscope.models import kept, loading, runs, wrapping
from sinkscope.models import requests as checking
from sinkscope.models.inputs import Sample, make_sample
from sinkscope.models.patch_map import PatchMap, PatchMaps
from sinkscope.models.remote import call_to
from sinkscope.models.report import Report, make_report
from sinkscope.models.runs import Engine, Generation, Run, finish_run
from sinkscope.models.stand_ins import stand_in
from sinkscope.models.tracing import OpenTrace
from sinkscope.models.wire import Traffic, Wire
from sinkscope.protocols import Intervention, Probe
from sinkscope.sites import Tower


class LVLM:
    """A vision-language model with named sites; every pass runs in evaluation mode.

    Args:
        module: A ``transformers`` image-text-to-text model; ModelError if sinkscope cannot read it.
        processor: Its processor, or None: then `prepare` takes ready inputs only.
        verify: Whether short passes measure and prove the anatomy: None once for a model of this structure
            (what was found is kept in the cache folder), True now, False when it is first asked for,
            without proof.

    Attributes:
        name: Repository id, folder, or class name.
        verified: Whether a forward pass has proven the anatomy when the model was loaded.
        wire: How long remote runs wait and try again, a `Wire`; ``traffic``: what the last one cost, or None.
    """

    def __init__(
        self, module: nn.Module, processor: Any = None, *, verify: bool | None = None
    ) -> None:
        check_choice((None, True, False), error=ModelError, verify=verify)
        if isinstance(processor, type) or (processor is not None and not callable(processor)):
            raise InputError(
                f"Got a processor of type {type(processor).__name__}; expected that of the model, or None "
                "for ready inputs only. Write AutoProcessor.from_pretrained(...) of the same checkpoint."
            )
        self._anatomy = read_anatomy(module)
        self._module: Any = module
        self._processor = processor
        self._places = wrapping.Places(module, processor)
        self.name = str(getattr(module, "name_or_path", "") or type(module).__name__)
        self.verified = False
        self._proofs: tuple[Any, Any] = ({}, None)
        self._verify = verify
        self._made_by: Any = None  # a function that makes it again, on a worker
        self._open = OpenTrace(self._places.here, self._anatomy)
        self._maps = PatchMaps(module, stand_in)
        self._asked = self._unproven = False
        self.wire = Wire()
        self.traffic: Traffic | None = None
        kept.begin(self)

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
        verify: bool | None = None,
    ) -> LVLM:
        """Load a model and its processor from a hub repository or a folder; ``verify`` as for the class.

        CheckpointError if the checkpoint is missing, incomplete or corrupt, or an option is wrong.

        Args:
            name: Repository id or folder; ``revision`` is a branch, tag or commit of it.
            dtype: ``"auto"``, a torch dtype or its name.
            device_map: Passed to ``transformers``, such as ``"auto"``.
            attn_implementation: ``"sdpa"``, ``"eager"``, ... or None for the model's default.
            quantization_config: One of ``transformers``' configs, or the same as a dict.
            remote: True to run on NDIF, without weights here; ``"local"`` takes the same path here.
        """
        check_choice((None, True, False), error=ModelError, verify=verify)
        check_path(name=name)
        options: dict[str, Any] = dict(revision=revision, dtype=dtype, device_map=device_map)
        options["attn_implementation"] = attn_implementation
        options["trust_remote_code"] = trust_remote_code
        options["quantization_config"] = quantization_config
        module, processor, by_name = loading.open_checkpoint(name, options, remote)
        lvlm = cls(module, processor, verify=verify if by_name is None else False)
        lvlm._places = wrapping.Places(module, processor, by_name, usual=remote)
        lvlm.name = str(name)
        lvlm._made_by = loading.again(cls, name, **options, remote=remote, verify=verify)
        return lvlm

    @property
    def anatomy(self) -> Anatomy:
        """Where the model keeps its parts, under its present attention kernel; measured when first asked."""
        if not self._asked:
            with suppress(SinkscopeError):  # then it stays as declared, until a sample comes
                kept.first_sample(self)
        known, get = self._anatomy, self._module.get_submodule
        towers = [tower for tower in (known.vision, known.language) if tower.blocks]
        firsts = [get(next(filter(None, tower.attention), tower.blocks[0])) for tower in towers]
        kernels = [kernel_of(getattr(first, "config", None)) for first in firsts]
        if kernels != [tower.kernel for tower in towers]:
            self._anatomy = known.again(read_anatomy(self._module)).proven(*self._proofs)
        return self._anatomy

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
        """The processor's tokenizer, or the processor of a text-only model itself, or None."""
        return getattr(self._processor, "tokenizer", self._processor)

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self._places.device

    def __repr__(self) -> str:
        a = self._anatomy
        sizes = (
            f"{t.tower} {t.n_layers} x {t.d_model}" for t in (a.vision, a.language) if t.blocks
        )
        return f"LVLM({self.name!r}, {a.model_type}: {', '.join(sizes)})"

    @typed
    def prepare(
        self,
        images: Any = None,
        text: Any = None,
        *,
        inputs: Mapping[str, Any] | None = None,
        rendered: bool = False,
    ) -> Sample:
        """Images and text as model inputs, with a map of every token; InputError if they do not fit.

        Args:
            images: What `pictures.open_image` takes, or a list: all of one text, or one entry (an
                image or a list of images) for each of several texts, or one image for all.
            text: A question or chat messages, or a list of them: one batch row each, left-padded.
                ``<image>`` may stand alone on a question's first or last line. Messages hold their
                pictures, or take ``images`` in order.
            inputs: Instead of both, the processor output you made yourself.
            rendered: Whether texts are finished prompts, with one image token per image.
        """
        kept.follow(self)
        sample = make_sample(self, images, text, inputs, rendered=rendered)
        if not self._anatomy.vision.blocks or bool((sample.tokens.image >= 0).any()):
            kept.prove(self, sample)
        return sample

    def _mapped(self, ready: Mapping[str, Any], visual: Tensor) -> PatchMap | None:
        """Where ViT tokens go in inputs with some image tokens; None without a vision tower or images."""
        if not self._anatomy.vision.blocks or not visual.any():
            return None
        placed = self._places.placed(ready)
        if not self._anatomy.measured:
            self._anatomy = self._maps.settle(self.anatomy, placed, visual)
        return self._maps.of(self.anatomy, placed, visual)

    @typed
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
        effects: bool = True,
        engine: Engine | None = None,
        job: str | None = None,
    ) -> Run:
        """Run one forward pass with any number of probes and interventions.

        Probes see what the model uses after all edits of a site. Edits apply in list order; those of
        one attention call in stages first: keys, logits, weights, values. ProbeError or InterventionError
        if one does not fit, NoEffectError if one touched nothing, NonFiniteError if live logits hold NaN.
        ``run[probe]`` is a probe's result; what interventions did stands in ``run.effects``.

        Args:
            logits: ``"all"`` or ``"last"``; None is ``"all"`` here and ``"last"`` on remote runs.
            remote: As in `from_pretrained`, whose value None stands for.
            kl: Whether to run once more without interventions and put ``KL(unedited || edited)`` of
                the next token, in nats, into the effects.
            grad: Whether the logits keep their graph, on the model's device; runs here only.
            effects: Whether to measure the attention on edited keys before and after. It is free for
                masks and factors of weights under torch's attention on the CPU, and costs up to three
                more attention calls per layer else. What was touched is always told.
            engine: ``"hooks"`` or ``"nnsight"``, which give the same bits; None is the first, which is
                faster, for runs here, and nnsight for remote ones.
            job: A job that was sent by the same call, as a RemoteError names it: its result is fetched.
        """
        kept.follow(self)
        asked, edits = checking.check_run(sample, self.anatomy, probes, interventions)
        where = self._places.choose(remote, grad)
        check_choice(("all", "last", None), error=ProbeError, logits=logits)
        every = logits == "all" or not (logits or where)
        context, last = Context(self.anatomy, sample.tokens), sample.tokens.last
        plan = checking.plan_of(asked, edits, context, self, effects)
        chosen = runs.choose_engine(engine, where, self._module, [plan])
        model, inputs, call = self._on(where, sample, job, last if kl and edits else None)
        made = runs.run_plan(model, inputs, plan, None if every else last, call, grad, chosen)
        self.traffic = call.traffic if call else self.traffic
        out = finish_run(made, asked, context, edits)
        application.require_effects(edits, [out.effects])
        if not (kl and edits):
            return out
        run = partial(self.run, logits="last", remote=False, engine=engine)
        plain = call.plain if call else run(sample).logits
        return application.with_kl(out, plain, last)

    @typed
    def generate(
        self,
        sample: Sample,
        probes: Sequence[Probe] = (),
        interventions: Sequence[Intervention] = (),
        *,
        max_new_tokens: int | None = None,
        remote: bool | str | None = None,
        effects: bool = True,
        engine: Engine | None = None,
        job: str | None = None,
        **options: Any,
    ) -> Generation:
        """Generate an answer with the KV cache, probing every forward pass.

        The answer is the one of ``model.generate(**sample.inputs, **options)``. Probes of the vision
        tower have a result at the prompt only. A decode step has one query, and the keys so far.
        Interventions apply at the steps they name. For ``remote``, ``effects``, ``engine`` and ``job``
        see `run`.

        Args:
            max_new_tokens: Upper bound on the answer's length, or None.
            options: Further settings of ``generate`` with one query per row, such as no beams. A
                static cache is replaced by one that grows, which changes no number. InputError if they,
                or the model's ``generation_config``, ask for what cannot be probed.
        """
        kept.follow(self)
        asked, edits = checking.check_run(sample, self.anatomy, probes, interventions)
        where = self._places.choose(remote)
        at = runs.generator_of(self._module)
        defaults = getattr(self._module.get_submodule(at), "generation_config", None)
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        options |= checking.check_generation(sample, options, defaults)
        later = [probe for probe in asked if probe.tower == "language"]
        context = partial(Context, self.anatomy, sample.tokens)
        first = checking.plan_of(asked, edits, context(0), self, effects)
        plans = [first, checking.plan_of(later, edits, context(1), self, effects)]
        chosen = runs.choose_engine(engine, where, self._module, plans)
        model, inputs, call = self._on(where, sample, job)
        outputs, sequences = runs.generate_plan(model, inputs, plans, options, call, at, chosen)
        self.traffic = call.traffic if call else self.traffic
        prompt, steps = sample.tokens.ids.shape[1], []
        ends = checking.setting("eos_token_id", options, defaults)
        for step, output in enumerate(outputs):
            ended = checking.ended_rows(sequences, prompt, step, ends)
            steps.append(finish_run(output, later if step else asked, context(step, ended), edits))
        application.require_effects(edits, [step.effects for step in steps])
        decode = getattr(self.tokenizer, "batch_decode", None)
        text = decode and tuple(decode(sequences[:, prompt:], skip_special_tokens=True))
        return Generation(sequences, text, tuple(steps))

    @typed
    def edited(
        self, interventions: Sequence[Intervention]
    ) -> AbstractContextManager[application.Edited]:
        """The same model with interventions on, until the block ends: it has `run` and `generate`."""
        checked = application.check_interventions(interventions)
        return closing(application.Edited(self, checked))

    @typed
    def trace(self, sample: Sample, *, grad: bool = False) -> Any:
        """Open nnsight's own trace of one forward pass here, on the sample's inputs.

        The block runs while the model does, reads each `site` in forward order, and ``.save()`` keeps a
        value. ``grad`` keeps a graph. The model is left as it was, also after an error.
        """
        kept.follow(self)
        checking.check_run(sample, self.anatomy)
        self._places.choose(False)
        self._open = OpenTrace(self._places.here, self.anatomy, grad)
        model, inputs, _ = self._on(False, sample)
        return model.model.trace(**inputs, backend=self._open)

    @property
    def nn(self) -> Any:
        """The nnsight model of `module`, inside the block of `trace`."""
        return self._open.root

    @typed
    def site(self, tower: Tower, layer: int, name: str) -> Any:
        """The value at a site of `sinkscope.sites` inside the block of `trace`, else ProbeError.

        States are the model's own tensor, and may be edited in place; a branch that the model multiplies
        by a factor is a copy: use `set_site`. ``"attention"`` gives a list of ``(function, args, kwargs)``.
        """
        return self._open.site(tower, layer, name)

    def set_site(self, tower: Tower, layer: int, name: str, value: Tensor) -> None:
        """Replace the states at a site, not ``"attention"``, by a tensor of their shape and dtype."""
        self._open.set_site(tower, layer, name, value)

    def report(self) -> Report:
        """Anatomy, and whether every probe and edit is exact, approximate or unavailable, and why."""
        return make_report(self)

    def _on(self, where: Any, sample: Sample, *how: Any) -> tuple[Any, Any, Any]:
        """The wrapped model for a run there, the inputs on its device, and what carries it there, or None."""
        call = call_to(where, self.wire, *how)
        there = "local" if call and call.job_id else where  # to fetch a result no hub is needed
        return self._places.model(there, self.name), self._places.placed(sample.inputs), call

    def __iter__(self) -> Iterator[Any]:
        write = "lvlm.module.get_submodule(path) for the module at one of the paths of lvlm.anatomy"
        raise ModelError(f"Got iteration over an LVLM; expected a use of its parts. Write {write}.")
