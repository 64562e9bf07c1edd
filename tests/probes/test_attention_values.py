"""AttentionValues against hooks on Hugging Face's value projections; equality is bitwise in fp32."""

import pytest
import torch

import sinkscope as ss
from sinkscope.testing import TINY, random_image
from tests.interventions.reference import grown_inputs
from tests.reference import in_cache, projected_values

FAMILIES = tuple(TINY)
KERNELS = ("sdpa", "eager")


def assert_equal(got, want):
    """Bitwise, NaN at the same places."""
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


def masked(values, live):
    """NaN where ``live`` ``[batch pos]`` is False."""
    return values.masked_fill(~live[:, None, None, :, None], float("nan"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_of_the_decoder_are_those_of_its_projection(tiny, batch, family, kernel):
    lvlm = tiny(family, kernel)
    sample = batch(lvlm)
    every, some = ss.probes.AttentionValues(), ss.probes.AttentionValues([0, 2], "image")
    run = lvlm.run(sample, [every, some])
    want = projected_values(lvlm.module, lvlm, sample.inputs, "language")
    assert_equal(run[every].values, masked(want, sample.tokens.live))
    assert_equal(run[some].values, masked(want[:, [0, 2]], sample.tokens.image >= 0))
    tower = lvlm.anatomy.language
    assert run[every].values.shape[2] == tower.kv_heads
    assert tower.kv_heads < tower.heads


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_of_the_vision_tower_are_those_of_its_projection(tiny, batch, family, kernel):
    lvlm = tiny(family, kernel)
    sample = batch(lvlm)
    probe, vision = ss.probes.AttentionValues(tower="vision"), sample.tokens.vision
    got = lvlm.run(sample, [probe])[probe].values
    want = projected_values(lvlm.module, lvlm, sample.inputs, "vision")
    if vision.layout is not None:
        rows = [want[0][:, :, index.clamp(min=0)] for index in vision.layout]
        want = torch.stack(rows)
    assert_equal(got, masked(want, vision.live))


@pytest.mark.parametrize("family", FAMILIES)
def test_values_at_decode_steps_are_those_in_the_cache(tiny, batch, family):
    lvlm = tiny(family)
    sample = batch(lvlm)
    probe, image = ss.probes.AttentionValues(), ss.probes.AttentionValues([1], "image")
    norms = ss.ValueNorms()
    image_token = [lvlm.anatomy.image_token_id]
    steps = 6
    out = lvlm.generate(
        sample,
        [probe, image, norms],
        max_new_tokens=steps,
        min_new_tokens=steps,
        suppress_tokens=image_token,
    )
    prompt = sample.tokens.ids.shape[1]
    for step, run in enumerate(out.steps):
        grown = grown_inputs(sample, out.sequences, step)
        want = projected_values(lvlm.module, lvlm, grown, "language")
        alive = grown["attention_mask"].bool()
        want = masked(want, alive)
        if step:
            gone = ~in_cache(lvlm, prompt + step)[:, :, :, :, None]
            want = want.masked_fill(gone, float("nan"))
        got = run[probe].values
        assert torch.equal(got.isnan(), want.isnan())
        assert (got - want).nan_to_num().abs().max() <= 1e-5 * want.nan_to_num().abs().max()
        length = got.norm(dim=-1)
        assert torch.equal(length.isnan(), run[norms].norms.isnan())
        assert torch.allclose(length, run[norms].norms, equal_nan=True)
        kept = ~run[image].values[:, 0, 0, :, 0].isnan()
        assert torch.equal(kept[:, prompt:], torch.ones(2, step, dtype=torch.bool))
        assert not (kept[:, :prompt] & (sample.tokens.image < 0)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_in_half_precision_are_the_models_own(tiny, dtype):
    lvlm = tiny("llava-clip-llama", "sdpa", dtype)
    sample = lvlm.prepare(inputs=half_inputs(lvlm, dtype))
    probe = ss.probes.AttentionValues()
    got = lvlm.run(sample, [probe])[probe].values
    assert got.dtype == torch.float32
    assert_equal(got, projected_values(lvlm.module, lvlm, sample.inputs, "language"))


def half_inputs(lvlm, dtype):
    """Inputs whose pixels have the model's dtype, as the plain module needs them."""
    inputs = lvlm.prepare(images=random_image(64, 64, 0), text="what is it").inputs
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def test_values_are_those_after_the_runs_edits(tiny, batch):
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    probe, image = ss.probes.AttentionValues([0]), sample.tokens.image >= 0
    plain = lvlm.run(sample, [probe])[probe].values.movedim(3, 1)
    edits = [ss.AblateValues("image", layers=[0])]
    edited = lvlm.run(sample, [probe], edits)[probe].values.movedim(3, 1)
    assert (edited[image] == 0).all()
    rest = sample.tokens.live & ~image
    assert torch.equal(edited[rest], plain[rest])


@pytest.mark.parametrize("kind", [ss.probes.AttentionValues, ss.ValueNorms])
@pytest.mark.parametrize("narrow", [{"heads": [1]}, {"queries": "last"}])
def test_values_that_differ_by_reader_are_not_one_number(tiny, batch, narrow, kind):
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    edit = ss.AblateValues("image", layers=[0], **narrow)
    with pytest.raises(ValueError, match="heads and queries of one key read different values"):
        lvlm.run(sample, [kind()], [edit])
    lvlm.run(sample, [ss.probes.AttentionValues([1])], [edit])


def test_the_table_of_values(tiny, batch):
    lvlm = tiny("llava-clip-llama")
    sample = batch(lvlm)
    probe = ss.probes.AttentionValues([1], "last")
    result = lvlm.run(sample, [probe])[probe]
    table = result.to_dataframe()
    assert list(table.columns) == ["batch", "layer", "kv_head", "pos", "dim", "value"]
    tower = lvlm.anatomy.language
    assert len(table) == 2 * tower.kv_heads * tower.d_head
    assert set(table["layer"]) == {1}
