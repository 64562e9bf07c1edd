"""The loss that gates are trained on, and its gradients, against plain PyTorch with hooks."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import sinkscope as ss
from sinkscope.data.batches import IGNORED, make_batch, read_dataset
from sinkscope.kernels.walk import first_tensor
from sinkscope.lsg.passes import answer_losses, frozen, share
from sinkscope.testing import TINY
from tests.lsg.reference import Gated, sequential, twin_of
from tests.lsg.test_data import records

NAMES = {"0.": "norm.", "1.": "inner.", "3.": "outer."}


def vit_norms(model, lvlm, batch):
    """The norm of every ViT token where the projector reads, ``[image pos]``."""
    (layer,) = lvlm.anatomy.feed_layers[-1:]
    seen = []
    hook = model.get_submodule(lvlm.anatomy.vision.blocks[layer]).register_forward_hook(
        lambda part, args, out: seen.append(first_tensor(out))
    )
    with torch.no_grad():
        model(**batch.inputs)
    hook.remove()
    norms = seen[0].norm(dim=-1)
    layout = batch.tokens.vision.layout
    return norms if layout is None else norms[layout.clamp(min=0)].masked_fill(layout < 0, 0.0)


def carried(batch, flagged):
    """LLM positions made of a flagged ViT token, ``[row pos]``."""
    tokens = batch.tokens
    out = torch.zeros(tokens.ids.shape, dtype=torch.bool)
    for row, pos in (tokens.image >= 0).nonzero().tolist():
        sources = [s for s in tokens.sources[row, pos].tolist() if s >= 0]
        out[row, pos] = any(flagged[tokens.image_index[row, pos], s] for s in sources)
    return out


def gate_of(lvlm, layer, tau, **choices):
    """A gate whose coefficients differ from row to row."""
    gate = ss.LSG.for_model(lvlm, layer, v_detector=ss.detectors.Norm(tau), **choices)
    made = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (gate.outer.weight, gate.outer.bias, gate.inner.bias):
            tensor.add_(torch.randn(tensor.shape, generator=made))
    return gate


def reference_loss(model, gate, modules, batch, masks, signal=None):
    """Mean loss of the answers' tokens, in our own words."""
    gated = Gated(model, modules, gate.layer, masks, batch.tokens.last, signal=signal)
    with gated.on():
        logits = model(**batch.inputs).logits
    losses = cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED
    )
    return losses, gated.coefficients


@pytest.mark.parametrize(
    ("family", "layer"),
    [*((family, 0) for family in sorted(TINY)), ("llava-clip-llama", "embed"), ("gemma3", 1)],
)
def test_loss_and_gradients_are_those_of_plain_pytorch(family, layer):
    lvlm = ss.LVLM(*TINY[family](), verify=False)
    model = twin_of(family)
    batch = make_batch(lvlm, read_dataset(records()), range(5))
    norms = vit_norms(model, lvlm, batch)
    ordered = norms[norms > 0].sort().values
    tau = float(ordered[len(ordered) // 2 :][:2].mean())  # between two tokens: no rounding decides
    gate = gate_of(lvlm, layer, tau)
    image = batch.tokens.image >= 0
    v = carried(batch, norms >= tau)
    assert bool(v.any())
    assert bool((image & ~v).any())
    modules = sequential(gate)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    expected, rho = reference_loss(model, gate, modules, batch, [v, image & ~v])
    expected.backward()

    with frozen(lvlm.module):
        got = answer_losses([gate], share(lvlm, batch, [gate.config.edited]))
        loss = got.total / got.tokens
        loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert got.notes["rho_V"] == pytest.approx(float(rho[:, 0].detach().mean()), abs=1e-6)
    theirs = dict(modules.named_parameters())
    for old, new in NAMES.items():
        for kind in ("weight", "bias"):
            mine = gate.get_parameter(new + kind).grad
            torch.testing.assert_close(mine, theirs[old + kind].grad, atol=1e-5, rtol=1e-5)
            assert bool((mine != 0).any()) or (family, layer) == ("gemma3", 1), "sees no image"


@pytest.mark.parametrize("signal", ["mean", "visual"])
def test_a_mean_is_taken_over_the_prompt_and_never_over_the_answer(signal):
    lvlm = ss.LVLM(*TINY["llava-clip-llama"](), verify=False)
    model = twin_of("llava-clip-llama")
    batch = make_batch(lvlm, read_dataset(records()), range(5))
    gate = gate_of(lvlm, 0, 1e6, signal=signal)
    image = batch.tokens.image >= 0
    prompt = (batch.labels == IGNORED) & batch.inputs["attention_mask"].bool()
    over = prompt if signal == "mean" else image
    expected, _ = reference_loss(
        model, gate, sequential(gate), batch, [~image & image, image], signal=over
    )
    got = answer_losses([gate], share(lvlm, batch, [1]))
    torch.testing.assert_close(got.total / got.tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", sorted(TINY))
def test_an_attached_gate_has_the_same_loss(family):
    """The other implementation of the gate, on transformers' own loss."""
    lvlm = ss.LVLM(*TINY[family](), verify=False)
    batch = make_batch(lvlm, read_dataset(records()), range(5))
    gates = [gate_of(lvlm, layer, 5.0) for layer in ("embed", 0, 1)]
    for stack in ([], gates[1:2], gates[::2], gates):
        blocks = [gate.config.edited for gate in stack]
        got = answer_losses(stack, share(lvlm, batch, blocks or [0], whole=not stack))
        for gate in stack:
            gate.attach(lvlm.module)
        expected = lvlm.module(**batch.inputs, labels=batch.labels).loss
        for gate in stack:
            gate.detach()
        torch.testing.assert_close(got.total / got.tokens, expected, atol=1e-5, rtol=1e-5)


def test_a_right_answer_is_one_that_greedy_decoding_writes():
    lvlm = ss.load_bundled()
    given = list(ss.bundled.scene_questions(8, 4))
    batch = make_batch(lvlm, read_dataset(given), range(32))
    got = answer_losses([], share(lvlm, batch, [0], whole=True))
    sample = lvlm.prepare([r["image"] for r in given], [r["question"] for r in given])
    texts = lvlm.generate(sample, max_new_tokens=3).text
    right = [text.strip() == r["answer"] for text, r in zip(texts, given, strict=True)]
    assert got.correct.tolist() == right
    assert 0 < sum(right) < 32


@pytest.mark.parametrize("family", ["llava-clip-llama", "gemma3"])
def test_the_gate_is_fp32_under_a_bf16_model(family):
    lvlm = ss.LVLM(*TINY[family](dtype=torch.bfloat16), verify=False)
    same = ss.LVLM(*TINY[family](), verify=False)
    gate = gate_of(lvlm, 0, 5.0)
    batch = make_batch(lvlm, read_dataset(records()), range(5))
    got = answer_losses([gate], share(lvlm, batch, [1]))
    (got.total / got.tokens).backward()
    assert {p.dtype for p in gate.parameters()} == {torch.float32}
    assert got.total.dtype == torch.float32
    twin = gate.adopt(same)
    full = answer_losses([twin], share(same, batch, [1]))
    (full.total / full.tokens).backward()
    torch.testing.assert_close(got.total, full.total, rtol=0.05, atol=0.05)
    one, other = gate.outer.weight.grad.flatten(), twin.outer.weight.grad.flatten()
    assert torch.cosine_similarity(one, other, dim=0) > 0.9
