"""Images of the next batch are opened while the model works on this one, and nothing else changes."""

import threading
from contextlib import closing

import pandas as pd
import pytest
import torch

import sinkscope as ss
from sinkscope.data import ahead
from sinkscope.data.ahead import Ahead, samples_ahead
from sinkscope.errors import InputError
from sinkscope.experiments import Item
from sinkscope.models.patch_map import PatchMaps
from sinkscope.models.wrapping import ONE_AT_A_TIME
from sinkscope.testing import TINY, random_image, tiny_llava
from tests.conftest import FAMILIES

NORM = ss.detectors.Norm("3sigma")
ASKED = ("what is it", "how many red shapes are there , and where ?")


def items(n=3, **more):
    return [
        Item(random_image(60 + 28 * i, 90, i), asked, "red", image_id=f"im{i}", **more)
        for i in range(n)
        for asked in ASKED
    ]


def running():
    return [one.name for one in threading.enumerate() if one.name.startswith("sinkscope-ahead")]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num()) and one.dtype == other.dtype
    return one == other


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_those_of_prepare(family, tiny):
    lvlm, given = tiny(family), items(2)
    parts = [given[:2], given[2:]]
    with closing(samples_ahead(lvlm, parts)) as made:
        found = list(made)
    for part, (got,) in zip(parts, found, strict=True):
        want = lvlm.prepare(images=[i.image for i in part], text=[i.question for i in part])
        assert got.texts == want.texts
        assert got.inputs.keys() == want.inputs.keys()
        for pair in ((got.inputs, want.inputs), (vars(got.tokens), vars(want.tokens))):
            wanted = {k: v for k, v in pair[1].items() if k != "vision"}
            assert all(same(pair[0][k], v) for k, v in wanted.items())
    with closing(samples_ahead(lvlm, [given[:2]], apart=True)) as made:
        ((one, other),) = made
    assert (len(one), len(other)) == (1, 1)


class Opened:
    """An item that notes who asks for its image."""

    question = "what is it"

    def __init__(self, number, seen):
        self.number, self.seen, self.asked = number, seen, threading.Event()

    @property
    def image(self):
        self.seen.append((self.number, threading.current_thread().name))
        self.asked.set()
        return random_image(40, 40, self.number)


def test_one_batch_ahead_and_no_more(tiny):
    seen = []
    given = [Opened(i, seen) for i in range(4)]
    with closing(samples_ahead(tiny("llava-clip-llama"), [[one] for one in given])) as made:
        for i, (sample,) in enumerate(made):
            assert len(sample) == 1
            if i < 3:
                assert given[i + 1].asked.wait(20)  # while this batch is worked on
            assert [number for number, _ in seen] == list(range(min(i + 2, 4)))
    main = threading.main_thread().name
    assert [name.startswith("sinkscope-ahead") for _, name in seen] == [False, True, True, True]
    assert seen[0] == (0, main)
    assert not running()


def test_an_error_is_raised_at_its_batch_with_the_same_words(tiny, tmp_path):
    lvlm, gone = tiny("llava-clip-llama"), tmp_path / "gone.png"
    parts = [[Item(image, "what is it", "red")] for image in (random_image(40, 40, 0), gone)]
    with pytest.raises(InputError) as plain:
        lvlm.prepare(images=[gone], text=["what is it"])
    found = []
    with (
        pytest.raises(InputError) as raised,
        closing(samples_ahead(lvlm, parts)) as made,
    ):
        found += made
    assert str(raised.value) == str(plain.value)
    assert not running()
    with closing(samples_ahead(lvlm, parts)) as made:
        assert len(next(made)) == 1  # the one before was ready


def test_no_lock_is_waited_for(tiny):
    """A pass that runs, under the lock of passes, does not keep the next batch from being made."""
    lvlm, given = tiny("llava-clip-llama"), items(2)
    with (
        Ahead(lvlm, lambda processor, key: (processor is not lvlm.processor, key)) as loader,
        ONE_AT_A_TIME,
    ):
        loader.begin(3)
        assert loader.take(3) == (True, 3)
    with ONE_AT_A_TIME, closing(samples_ahead(lvlm, [given[:2], given[2:]])) as made:
        assert len(list(made)) == 2


def test_what_was_not_asked_for_is_not_taken(tiny):
    lvlm = tiny("llava-clip-llama")
    with Ahead(lvlm, lambda processor, key: 1 // key) as loader:
        assert loader.take(2) is None  # not begun
        loader.begin(1)
        assert loader.take(2) is None  # another
        loader.begin(0)
        assert loader.take(0) is None  # failed
        loader.begin(1)
        assert loader.take(1) == 1
    loader.begin(1)  # not open
    assert loader.take(1) is None


def test_a_processor_that_cannot_be_copied_is_used_as_before():
    model, processor = tiny_llava()
    processor.lock = threading.Lock()
    lvlm, given = ss.LVLM(model, processor), items(2)
    with closing(samples_ahead(lvlm, [given[:2], given[2:]])) as made:
        assert [len(sample) for (sample,) in made] == [2, 2]


def scenes(n=24):
    return [
        {"image": random_image(60, 90 + 10 * (i % 2), i), "attributes": {"c": i % 2}}
        for i in range(n)
    ]


def swept(lvlm, stop=None):
    score = "logprob" if stop is None else lambda item, said: stop()
    return ss.sweep(lvlm, items(), [0], [(0.5, 1.0)], v_detector=NORM, score=score).table


def trained(lvlm):
    data = [vars(item) for item in items(4)]
    how = {"v_detector": ss.detectors.Norm(2.0), "batch": 2, "accumulate": 2, "epochs": 2}
    made = ss.train_lsg(lvlm, data, [0, 1], validation=0.25, evaluate_every=2, **how)
    weights = {
        f"{layer}/{k}": float(v.double().sum())
        for layer, g in made.gates.items()
        for k, v in g.state_dict().items()
    }
    return pd.concat([made.history, pd.DataFrame([weights])])


def compared(lvlm, stop=None):
    def mask(trace):
        return [ss.MaskKeys(trace.v_sinks, allow_noop=True)] if stop is None else stop()

    how = {"v_detector": NORM, "l_detector": NORM, "batch": 2}
    return ss.compare(lvlm, items(), {"base": [], "mask": mask}, **how).table


def probed(lvlm, stop=None):
    def group(trace):
        return trace.sample.tokens.image >= 0 if stop is None else stop()

    how = {"groups": {"all": group}, "v_detector": NORM, "l_detector": NORM, "batch": 8}
    return ss.linear_probes(lvlm, scenes(), permutations=0, draws=50, **how).table


RUNS = {"sweep": swept, "train_lsg": trained, "compare": compared, "linear_probes": probed}


@pytest.mark.parametrize("name", RUNS)
def test_results_are_bitwise_those_without(name, monkeypatch):
    model, processor = TINY["qwen2.5-vl"]()
    lvlm, taken, threads = ss.LVLM(model, processor), [], set()
    take, run = Ahead.take, PatchMaps._pass

    def noted(self, key):
        taken.append(take(self, key))
        return taken[-1]

    def passed(self, *given):
        threads.add(threading.current_thread())
        return run(self, *given)

    monkeypatch.setattr(PatchMaps, "_pass", passed)
    with monkeypatch.context() as patched:
        patched.setattr(Ahead, "take", noted)
        found = RUNS[name](lvlm)
    ready = [one is not None for one in taken]
    assert len(ready) >= 3
    assert ready == [False] + [True] * (len(ready) - 1) or name == "train_lsg"
    assert sum(ready) >= len(ready) - 2  # the plain model's first batch, and that of training
    assert threads <= {threading.main_thread()}  # no pass runs in another
    monkeypatch.setattr(Ahead, "begin", lambda self, key: None)
    pd.testing.assert_frame_equal(found, RUNS[name](lvlm), check_exact=True)
    assert not running()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("name", ["sweep", "compare", "linear_probes"])
def test_nothing_runs_on_after_an_error(name, error, tiny, monkeypatch):
    """Also Ctrl-C, and while the next batch is still being made."""
    real, slow = ahead.process, threading.Event()

    def waits(*given):
        slow.wait(0.3)
        return real(*given)

    def stop():
        raise error("here")

    monkeypatch.setattr(ahead, "process", waits)
    with pytest.raises(error):
        RUNS[name](tiny("llava-clip-llama"), stop)
    assert not running()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_nothing_runs_on_after_an_error_in_training(error, tiny, monkeypatch):
    from sinkscope.training.loop import Loop

    def stop(self, bar):
        self.objective.share(self.plan(0)[0], self.plan(0)[1])
        raise error("here")

    monkeypatch.setattr(Loop, "_one_step", stop)
    with pytest.raises(error):
        trained(tiny("llava-clip-llama"))
    assert not running()


def test_a_dataset_that_is_read_in_the_main_thread_only(tiny):
    """As one behind a database connection: it is read there, and training is the same."""

    class Picky(list):
        def __getitem__(self, index):
            if threading.current_thread() is not threading.main_thread():
                raise RuntimeError("used in another thread")
            return super().__getitem__(index)

    lvlm, data = tiny("llava-clip-llama"), [vars(item) for item in items(2)]
    how = {"v_detector": ss.detectors.Norm(2.0), "batch": 1, "epochs": 1, "validation": 0.0}
    plain, picky = (ss.train_lsg(lvlm, one, [0], **how).history for one in (data, Picky(data)))
    pd.testing.assert_frame_equal(plain, picky, check_exact=True)
