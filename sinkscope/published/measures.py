"""Sink rate, massive activations, outlier tokens, visual sinks and register neurons, as they were published."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope import probes
from sinkscope.checks import check_choice, check_number, check_whole, typed
from sinkscope.detectors import NoSinks, SinkDimensions, known_for
from sinkscope.errors import DetectorError, InputError
from sinkscope.experiments import SinkTrace, trace_sinks
from sinkscope.interventions import Redistribute, TestTimeRegister, find_register_neurons
from sinkscope.models import LVLM, Sample
from sinkscope.probes import MassiveResult
from sinkscope.results import Result, tidy
from sinkscope.sites import Tower

LENGTH = 64  # tokens of a sequence in 2410.10781
VERSIONS = ("paper", "code")


@dataclass(frozen=True, eq=False)
class SinkRate(Result):
    """Attention received in the first tokens of a prompt, and how often it is a sink's.

    ``alpha`` is ``1 / (T - k + 1) sum_{i = k..T} A_ik`` of the key at the k-th live token, ``null`` the same
    under uniform attention.
    """

    source: ClassVar[str] = "Gu et al., arXiv:2410.10781, section 3; sail-sg/Attention-Sink af49727"
    alpha: Float[Tensor, "batch layer head key"]
    null: Float[Tensor, "batch layer key"]
    layers: tuple[int, ...]
    eps: float

    def rate(self) -> Float[Tensor, " key"]:
        """``Sink_k^eps``: the share of rows, layers and heads in which ``alpha > eps``, 0 to 1. Their script
        prints it in percent."""
        return (self.alpha > self.eps).float().mean(dim=(0, 1, 2))

    @property
    def first(self) -> float:
        """``Sink_1^eps``, that of the first token, which the paper reports."""
        return float(self.rate()[0])

    def to_dataframe(self) -> pd.DataFrame:
        """One line per key, from 0: its rate, its mean alpha and null."""
        means = {"alpha": self.alpha.mean(dim=(0, 1, 2)), "null": self.null.mean(dim=(0, 1))}
        return tidy({"rate": self.rate(), **means}, ("key",), {})


@typed
def sink_rate(lvlm: LVLM, sample: Sample, *, eps: float = 0.3, length: int = LENGTH) -> SinkRate:
    """Measure the sink rate of the decoder at the published length, 64 tokens (Gu et al. 2410.10781).

    Queries are the first ``length`` live tokens of each row: under a causal mask they attend as in a prompt
    that ends there. The rate depends on the length, so compare rates of one length. The paper takes 100
    text sequences; a sample with images answers for its own first tokens. InputError for shorter prompts.
    """
    check_number(above=0, below=1, eps=eps)
    check_whole(1, length=length)
    live = sample.tokens.live
    if (shortest := int(live.sum(dim=1).min())) < length:
        raise InputError(
            f"Got a prompt of {shortest} tokens; expected at least {length}, because the rate depends on "
            f"the length and is published for {LENGTH}. Give a longer text, or write length={shortest}, "
            "and compare with rates of that length only."
        )
    first = live & (live.cumsum(dim=1) <= length)
    probe = probes.ReceivedAttention(queries=first)
    got: Any = lvlm.run(sample, [probe], logits="last")[probe]
    keys = first.nonzero()[:, 1].view(len(live), length)
    null = got.null.gather(2, keys[:, None].expand(-1, got.null.shape[1], -1))
    at = keys[:, None, None].expand(-1, *got.received.shape[1:3], -1)
    return SinkRate(got.received.gather(3, at), null, got.layers, float(eps))


@dataclass(frozen=True, eq=False)
class MassiveEntries(Result):
    """The massive activations of every block's output: single numbers, ``massive`` among those of ``top``."""

    source: ClassVar[str] = "Sun et al., arXiv:2402.17762; locuslab/massive-activations 6521c05"
    top: MassiveResult
    massive: Bool[Tensor, "batch layer pos k"]
    layers: tuple[int, ...]
    absolute: float
    ratio: float

    def to_dataframe(self) -> pd.DataFrame:
        """One line per massive activation: batch, layer, pos, channel, its value and its ratio to the median."""
        at = self.massive.nonzero()
        places = {"batch": at[:, 0], "layer": torch.tensor(self.layers)[at[:, 1]], "pos": at[:, 2]}
        value = self.top.values[self.massive]
        median = self.top.median[at[:, 0], at[:, 1]]
        columns = {"channel": self.top.channels[self.massive], "value": value}
        made = {**places, **columns, "ratio": value.abs() / median}
        return pd.DataFrame({name: column.numpy() for name, column in made.items()})


@typed
def massive_activations(
    lvlm: LVLM,
    sample: Sample,
    *,
    tower: Tower = "language",
    layers: Any = None,
    absolute: float = 100.0,
    ratio: float = 1000.0,
) -> MassiveEntries:
    """Find massive activations: ``|h| > 100`` and at least 1000 medians of the layer (Sun et al. 2402.17762).

    ``h`` is the output of a block (`resid_post`), before any final norm, and the median is that of ``|h|``
    over all live tokens and channels of a row, as in their code. The paper says *about* 1000.
    """
    check_choice(("language", "vision"), tower=tower)
    check_number(0, absolute=absolute, ratio=ratio)
    width = lvlm.anatomy.tower(tower).d_model
    k = min(8, width)
    while True:  # until the smallest channel that was kept of every token is none
        probe = probes.MassiveActivations(layers, tower, k)
        top = lvlm.run(sample, [probe], logits="last")[probe]
        size = top.values.abs()
        massive = (size > absolute) & (size >= ratio * top.median[..., None, None])
        if k == width or not massive[..., -1].any():
            return MassiveEntries(top, massive, top.layers, float(absolute), float(ratio))
        k = min(4 * k, width)


@dataclass(frozen=True, eq=False)
class OutlierTokens(Result, columns={"norm": "norms", "outlier": "outliers"}):
    """Norms of ViT tokens in the output of block ``layer``, and the patches whose norm is above ``tau``."""

    source: ClassVar[str] = "Darcet et al., arXiv:2309.16588"
    norms: Float[Tensor, "image pos"]
    outliers: Bool[Tensor, "image pos"]
    patches: Bool[Tensor, "image pos"]
    tau: float
    layer: int

    @property
    def fraction(self) -> float:
        """The share of patches that are outliers, which the paper reports (2.37 % for DINOv2-g)."""
        return float(self.outliers.sum() / self.patches.sum())


@typed
def outlier_tokens(
    lvlm: LVLM, sample: Sample, *, tau: float = 150.0, layer: int | None = None
) -> OutlierTokens:
    """Find patches of high norm: an L2 norm above ``tau`` in the tower's output (Darcet et al. 2309.16588).

    150 is the paper's number for DINOv2-L and -g; it is read off a histogram of norms and belongs to one
    model. ``layer`` is the block whose output is read, before any final norm; None for the last.
    """
    check_number(above=0, tau=tau)
    last = lvlm.anatomy.tower("vision").n_layers - 1
    check_whole(0, last, layer=last if layer is None else layer)
    probe = probes.TokenNorms([last if layer is None else layer], "vision")
    got = lvlm.run(sample, [probe], logits="last")[probe]
    norms, patches = got.norms[:, 0], sample.tokens.vision.select("patch")
    return OutlierTokens(norms, (norms > tau) & patches, patches, float(tau), got.layers[0])


@dataclass(frozen=True, eq=False)
class VisualSinks(Result, columns={"phi": "phi", "sink": "sinks"}):
    """Sink-dimension values ``phi`` on what every block reads, and the tokens with ``phi > tau``, from block 2
    on. `edit` is VAR's edit in the ``version`` asked for."""

    source: ClassVar[str] = "Kang et al., arXiv:2503.03321; seilk/VisAttnSink 98e62d6"
    phi: Float[Tensor, "batch layer pos"]
    sinks: Bool[Tensor, "batch layer pos"]
    layers: tuple[int, ...]
    trace: SinkTrace
    version: str
    p: float
    rho: float

    def edit(self, layers: Any = None) -> Redistribute:
        """VAR on these sinks. In the paper's version they are those of the unedited run, ``p`` is taken and
        ``rho`` bounds the share of non-sinks; in the code's every layer of the edited run decides anew, ``p``
        is kept and ``rho`` bounds the share of sinks."""
        given: Any = {"p": self.p, "rho": self.rho}
        if self.version == "paper":
            return Redistribute.var_paper(self.trace, layers, **given)
        return Redistribute.var_code(self.trace, layers, **given, rule="live")


@typed
def var(
    lvlm: LVLM,
    sample: Sample,
    dims: Sequence[int] | None = None,
    *,
    version: Literal["paper", "code"] = "paper",
    tau: float = 20.0,
    p: float = 0.6,
    rho: float | None = None,
) -> VisualSinks:
    """Find visual attention sinks, ``phi > 20``, and redistribute their attention (VAR, Kang et al. 2503.03321).

    ``phi = max_{d in dims} |h_d| / rms(h)`` on what a block reads. ``dims`` are this model's sink channels;
    None for published ones. ``rho`` is 0.8 in the paper (0.5 for hallucination, 0.9 for vision-centric sets)
    and 0.5 in the code. DetectorError without channels, and for a ``tau`` of ``sqrt(D)`` or more, which no
    token can reach: 20 needs more than 400 channels.
    """
    check_choice(VERSIONS, version=version)
    check_number(0, p=p, rho=0.5 if rho is None else rho)
    if dims is None:
        known = known_for(lvlm)
        if known is None or not known.default:
            raise DetectorError(
                "Got dims=None for a model without published sink channels; expected channels. Write "
                "dims=ss.calibrate(lvlm, samples).language.dims, or the channels of its text backbone."
            )
        dims = known.l_dims
    rule = SinkDimensions(tuple(dims), tau)
    trace = trace_sinks(lvlm, sample, NoSinks("VAR has no rule for the vision tower"), rule)
    found = trace.l_detection
    sinks = found.mask & (torch.tensor(found.layers) >= 2)[:, None]
    rho = {"paper": 0.8, "code": 0.5}[version] if rho is None else float(rho)
    return VisualSinks(found.scores, sinks, found.layers, trace, version, float(p), rho)


@dataclass(frozen=True, eq=False)
class RegisterNeurons(Result):
    """Register neurons by vision block, most active first, and from how many outliers they were found."""

    source: ClassVar[str] = (
        "Jiang et al., arXiv:2506.08010; nickjiang2378/test-time-registers 860df43"
    )
    neurons: Mapping[int, tuple[int, ...]]
    outliers: int
    version: str

    def edit(self, count: int = 1, scale: float = 1.0) -> TestTimeRegister:
        """The extra token. The paper's text sets the neurons to zero on all other tokens and gives each its own
        largest activation; the code leaves CLS as it is and gives all neurons of a block the largest one."""
        code: Any = {"cls": "keep", "peak": "layer"} if self.version == "code" else {}
        return TestTimeRegister(self.neurons, count, scale, "zero", **code)

    def to_dataframe(self) -> pd.DataFrame:
        """Columns layer and neuron."""
        lines = [(layer, neuron) for layer, own in self.neurons.items() for neuron in own]
        return pd.DataFrame(lines, columns=["layer", "neuron"])


@typed
def test_time_registers(
    lvlm: LVLM,
    samples: Sequence[Sample],
    *,
    norm: float,
    max_layer: int,
    top_k: int,
    layer: int | None = None,  # noqa: PT028
    version: Literal["paper", "code"] = "paper",  # noqa: PT028
) -> RegisterNeurons:
    """Find register neurons, for an extra token that takes over from outlier patches (Jiang et al. 2506.08010).

    Score: mean over images and outlier positions of ``|activation|``. ``norm`` and ``layer`` say what an
    outlier is, as in `outlier_tokens`; blocks up to ``max_layer`` are searched for ``top_k`` neurons. They
    belong to one model: 75, 5 and 10 for OpenCLIP-B/16 and 150, 17 and 45 for DINOv2-L in the paper; 30, 5 and
    10, and 150 (at the last block but one), 17 and 50 in the code.
    """
    check_choice(VERSIONS, version=version)
    check_whole(1, top_k=top_k)
    check_whole(0, lvlm.anatomy.tower("vision").n_layers - 1, max_layer=max_layer)
    seen = [outlier_tokens(lvlm, sample, tau=norm, layer=layer).outliers for sample in samples]
    found = find_register_neurons(lvlm, samples, seen, top_k=top_k, max_layer=max_layer)
    count = sum(int(mask.sum()) for mask in seen)
    return RegisterNeurons({at: tuple(own) for at, own in found.items()}, count, version)


vars(test_time_registers)["__test__"] = False  # its name is no test's, though pytest thinks so
