"""What is easy to get wrong: shared nulls, rows that have ended, half precision, order, no rows."""

import pytest
import torch

import sinkscope as ss
from examples.kurtosis_probe import TokenKurtosis
from sinkscope.testing import TINY, random_image
from tests.probes.everything import assert_same, every_probe

FAMILIES = tuple(TINY)


def test_nulls_belong_to_their_queries(tiny):
    """Two probes in one run that differ in their queries have different nulls, each as if alone."""
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(), text="what is it")
    every, last = ss.ReceivedAttention(), ss.ReceivedAttention(queries="last")
    together = lvlm.run(sample, [every, last])
    n = sample.tokens.ids.shape[1]
    uniform = torch.full((n,), 1 / n)
    assert torch.allclose(together[last].null[0, 0], uniform, atol=1e-6)
    for probe in (every, last):
        assert_same(together[probe], lvlm.run(sample, [probe])[probe])


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_do_not_disturb_one_another(tiny, batch, family):
    """All at once, in any order, is what each gives alone."""
    lvlm = tiny(family)
    sample = batch(lvlm)
    probes = every_probe()
    forwards, backwards = lvlm.run(sample, probes), lvlm.run(sample, probes[::-1])
    for probe in probes:
        assert_same(forwards[probe], backwards[probe], probe)
        assert_same(forwards[probe], lvlm.run(sample, [probe])[probe], probe)


@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl"])
def test_rows_that_have_ended_are_nan(tiny, batch, family):
    """The first row ends early: from then on its results are NaN, and the other row's as before."""
    lvlm = tiny(family)
    sample = batch(lvlm)
    language = [probe for probe in every_probe() if probe.tower == "language"]
    open_end = lvlm.generate(sample, language, max_new_tokens=5, min_new_tokens=5)
    prompt = sample.tokens.ids.shape[1]
    answers = open_end.sequences[:, prompt:].tolist()
    end = next(token for token in answers[0] if token not in answers[1])
    stop = answers[0].index(end) + 1
    ended = lvlm.generate(sample, language, max_new_tokens=5, eos_token_id=end)
    assert ended.sequences[0, prompt : prompt + stop].tolist() == answers[0][:stop]
    assert len(ended.steps) == 5
    for step, (run, plain) in enumerate(zip(ended.steps, open_end.steps, strict=True)):
        for probe in language:
            for name, value in vars(run[probe]).items():
                if not torch.is_tensor(value) or name == "queries":
                    continue
                before = getattr(plain[probe], name)
                if step >= stop and value.is_floating_point():
                    assert value[0].isnan().all(), (step, probe, name)
                other = torch.allclose(
                    value[1].nan_to_num().float(), before[1].nan_to_num().float(), atol=1e-5
                )
                assert other, (step, probe, name)
                if step < stop and value.is_floating_point():
                    assert torch.equal(value[0].isnan(), before[0].isnan()), (step, probe, name)


QUERIES = ("query", "row", "pos")
KEYS = {
    "AttentionValues": "pos",
    "HeadWrites": "key",
    "ReceivedAttention": "key",
    "ValueNorms": "pos",
}


@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl"])
def test_tables_of_steps_name_positions_in_the_whole_sequence(tiny, batch, family):
    """The newest token's; those of keys from the first live one; -1 at an end."""
    lvlm = tiny(family)
    sample = batch(lvlm)
    probes = [probe for probe in every_probe() if probe.tower == "language"]
    probes = [probe for probe in probes if not isinstance(probe, ss.probes.GroupMeans)] + [
        TokenKurtosis()
    ]
    prompt = sample.tokens.ids.shape[1]
    answers = lvlm.generate(sample, max_new_tokens=3, min_new_tokens=3).sequences[:, prompt:]
    first, second = answers.tolist()
    other, end = next(
        (row, token)
        for row, mine, others in ((1, first, second), (0, second, first))
        for token in mine[:2]
        if token not in others
    )
    step = lvlm.generate(sample, probes, max_new_tokens=3, eos_token_id=[end]).steps[2]
    begin = sample.tokens.live[other].int().argmax().item()
    newest = prompt + 1
    for probe in probes:
        result = step[probe]
        table = result.to_dataframe()
        assert set(table["batch"]) == {other}, probe
        keys = KEYS.get(type(probe).__name__)
        if keys is not None:
            assert table[keys].max() == newest, probe
            assert table[keys].min() == begin or isinstance(probe, ss.probes.AttentionValues), probe
            continue
        axis = next(axis for axis in QUERIES if axis in table)
        assert set(table[axis]) == {newest}, probe
        for name in ("positions", "queries", "rows"):
            if hasattr(result, name):
                at = getattr(result, name)
                assert (at[other].item(), at[1 - other].item()) == (newest, -1), probe


@pytest.mark.parametrize("kind", [ss.ValueNorms, ss.HeadWrites, ss.ReceivedAttention])
def test_keys_of_a_sliding_layer_alone_are_those_beside_other_layers(tiny, kind):
    lvlm = tiny("gemma3")
    sample = lvlm.prepare(images=random_image(), text="what is it")
    alone, beside = kind(layers=[0]), kind()
    step = lvlm.generate(sample, [alone, beside], max_new_tokens=2, min_new_tokens=2).steps[1]
    table = step[beside].to_dataframe()
    table = table[table["layer"] == 0].reset_index(drop=True)
    assert step[alone].to_dataframe().equals(table)
    assert table.iloc[:, 3].min() > 0


def test_generation_ends_when_all_rows_have_ended(tiny):
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(), text="what")
    first = int(lvlm.generate(sample, max_new_tokens=1).sequences[0, -1])
    out = lvlm.generate(sample, [ss.TokenNorms()], max_new_tokens=5, eos_token_id=[first])
    assert len(out.steps) == 1
    assert out.steps[0].logits.shape[1] == 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 6e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl"])
def test_masses_in_half_precision_are_as_good_as_reported(tiny, family, dtype, tolerance):
    lvlm = tiny(family, "sdpa", dtype)
    sample = lvlm.prepare(images=random_image(96, 96, 3), text="what is it")
    for tower, groups in (
        ("language", {"image": "image", "text": "text"}),
        ("vision", {"patch": "patch"}),
    ):
        plain = ss.AttentionMass(groups, tower=tower)
        exact = ss.AttentionMass(groups, tower=tower, precision="float32")
        run = lvlm.run(sample, [plain, exact])
        assert (run[plain].mass - run[exact].mass).abs().nan_to_num().max() < tolerance


def test_what_is_computed_in_fp32_is_so_under_autocast(tiny):
    """Rows of patterns sum to 1 within fp32's rounding; under bf16 they are off by 2e-3."""
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(), text="what is it")
    patterns, mass = ss.AttentionPatterns("text"), ss.AttentionMass({"image": "image"})
    with torch.autocast("cpu", torch.bfloat16):
        run = lvlm.run(sample, [patterns, mass])
    rows = run[patterns].patterns.nan_to_num().sum(dim=-1)
    assert (rows - 1).abs().max() < 1e-5
    plain = lvlm.run(sample, [mass])
    assert 1e-4 < (run[mass].mass - plain[mass].mass).abs().nan_to_num().max() < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_no_row_is_an_empty_answer_not_a_crash(tiny, batch, family):
    """A mask that selects nothing, as the sinks of a sink-free model do."""
    lvlm = tiny(family)
    sample = batch(lvlm)
    for tower, live in (("language", sample.tokens.live), ("vision", sample.tokens.vision.live)):
        nothing = torch.zeros_like(live)
        patterns = ss.AttentionPatterns(nothing, tower=tower)
        mass = ss.AttentionMass({"none": nothing}, tower=tower)
        run = lvlm.run(sample, [patterns, mass])
        assert run[patterns].patterns.isnan().all()
        assert (run[patterns].rows == -1).all()
        assert len(run[patterns].to_dataframe()) == 0
        assert run[mass].mass.nan_to_num().abs().max() == 0
        some = torch.zeros_like(live)
        some[0] = live[0]
        part = ss.AttentionPatterns(some, tower=tower)
        got = lvlm.run(sample, [part])[part].patterns
        assert not got[0].isnan().all()
        assert got[1].isnan().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_may_differ_by_layer(tiny, batch, family):
    lvlm = tiny(family)
    sample = batch(lvlm)
    for tower, live in (("language", sample.tokens.live), ("vision", sample.tokens.vision.live)):
        layers = lvlm.anatomy.tower(tower).n_layers
        by_layer = (
            torch.rand(len(live), layers, live.shape[1], generator=torch.manual_seed(0)) < 0.5
        )
        probe = ss.AttentionMass({"some": by_layer & live[:, None]}, tower=tower)
        got = lvlm.run(sample, [probe])[probe].mass
        for layer in range(layers):
            one = ss.AttentionMass({"some": by_layer[:, layer] & live}, layers=[layer], tower=tower)
            want = lvlm.run(sample, [one])[one].mass[:, 0]
            assert torch.equal(got[:, layer].nan_to_num(), want.nan_to_num())


def test_logits_last_is_the_last_live_position(tiny, batch):
    """Also where somebody padded on the right."""
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(), text="what is it")
    inputs = {
        name: torch.nn.functional.pad(value, (0, 3)) if value.ndim == 2 else value
        for name, value in sample.inputs.items()
    }
    padded = lvlm.prepare(inputs=inputs)
    want = lvlm.run(sample).logits[:, -1:]
    assert torch.allclose(lvlm.run(padded, logits="last").logits, want, atol=1e-5)


def test_layers_are_sorted_and_counted_once(tiny):
    lvlm = tiny("llava-clip-llama")
    sample = lvlm.prepare(images=random_image(), text="what")
    probe = ss.TokenNorms(layers=[2, 0, 2])
    result = lvlm.run(sample, [probe])[probe]
    assert result.layers == (0, 2)
    assert result.norms.shape[1] == 2
    assert lvlm.anatomy.language.layers(1) == (1,)
