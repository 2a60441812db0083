"""`lmserve.Scheduler` around a scripted model: text, stops, sessions, faults, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from lmserve import LmserveError, SamplingParams, Scheduler, SessionRef, StopParams
from lmserve._core import Event, Tokenizer

SIZES: dict[str, Any] = {"num_blocks": 16, "block_size": 4, "vocab_size": 30, "max_model_len": 48}
WORDS = "abcdefghijklmnopqrstuvwxyz"


def tokenizer() -> Tokenizer:
    """One token for each letter."""
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {letter: at for at, letter in enumerate(WORDS)},
        "merges": [],
    }
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    parts = {"normalizer": None, "pre_tokenizer": decoder, "post_processor": None, "decoder": decoder, "model": model}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], **parts}
    return Tokenizer.from_json(json.dumps(whole).encode())


def run(scheduler: Scheduler) -> Iterator[Event]:
    """The next letter of the alphabet follows each token."""
    while (step := scheduler.plan()) is not None:
        yield from scheduler.commit((step.token_ids[step.sample_rows] + 1) % 26)


def test_text_comes_in_deltas_and_a_stop_string_ends_it() -> None:
    scheduler = Scheduler(**SIZES, tokenizer=tokenizer())
    scheduler.add("abc", stopping=StopParams(max_tokens=20, stop=["hi"]))
    scheduler.add([5, 6], stopping=StopParams(max_tokens=3), n=2)
    events = list(run(scheduler))
    stopped = [e for e in events if e.request == 1]
    assert "".join(e.text for e in stopped) == "defg"
    assert [e.token for e in stopped] == [3, 4, 5, 6, 7, 8]
    assert (stopped[-1].finish_reason, stopped[-1].tokens) == ("stop", 6)
    assert stopped[-1].usage is not None
    assert (stopped[-1].usage.prompt_tokens, stopped[-1].usage.completion_tokens) == (3, 6)
    for choice in range(2):
        of_choice = [e for e in events if (e.request, e.choice) == (2, choice)]
        assert "".join(e.text for e in of_choice) == "hij"
        assert [e.finish_reason for e in of_choice] == [None, None, "length"]


def test_steps_are_writable_arrays_of_the_documented_shapes() -> None:
    scheduler = Scheduler(**SIZES, max_batch=4, max_batch_tokens=20, seed=1)
    sampling = SamplingParams(temperature=0.5, top_k=3, repetition_penalty=1.5, logit_bias=[(4, -2.0)])
    scheduler.add([1, 2, 3, 1, 2], sampling=sampling, stopping=StopParams(max_tokens=1))
    scheduler.add(list(range(20)), stopping=StopParams(max_tokens=1))
    step = scheduler.plan()
    assert step is not None
    assert step.sequences == [(1, 0), (2, 0)]
    assert step.query_start.tolist() == [0, 5, 20]
    assert step.context_lens.tolist() == [5, 15]
    assert step.positions.tolist() == [*range(5), *range(15)]
    assert step.block_tables.shape == (2, 4)
    block_of = step.block_tables[1, step.positions[5:] // 4]
    assert step.slots[5:].tolist() == (block_of * 4 + step.positions[5:] % 4).tolist()
    assert step.sample_rows.tolist() == [4]
    assert (step.top_k.tolist(), step.temperature.tolist()) == ([3], [0.5])
    assert (step.seen_token.tolist(), step.seen_count.tolist()) == ([1, 2, 3], [0, 0, 0])
    assert (step.bias_token.tolist(), step.bias_value.tolist()) == ([4], [-2.0])
    assert 0 <= step.uniform[0] < 1
    assert all(array.flags.writeable for array in (step.slots, step.uniform, step.block_tables))


def test_a_failed_step_and_an_abort_leave_sessions_at_their_last_turn() -> None:
    scheduler = Scheduler(**SIZES)
    session = SessionRef(7, create=True)
    scheduler.add([0, 1], session=session, stopping=StopParams(max_tokens=2))
    assert list(run(scheduler))[-1].finish_reason == "length"
    assert scheduler.session_tokens(7) == [0, 1, 2, 3]
    scheduler.add([9], session=session)
    with pytest.raises(LmserveError) as caught:
        scheduler.add([9], session=session)
    assert (caught.value.status, caught.value.code) == (409, "session_busy")
    assert scheduler.plan() is not None
    (event,) = scheduler.fail("out of memory")
    assert (event.finish_reason, event.error) == ("error", "out of memory")
    for keep, expected in [(False, [0, 1, 2, 3]), (True, [0, 1, 2, 3, 9, 10])]:
        request = scheduler.add([9], session=session, stopping=StopParams(max_tokens=5))
        assert scheduler.plan() is not None
        scheduler.commit([10])
        (event,) = scheduler.abort(request, keep=keep)
        assert (event.finish_reason, event.tokens) == ("abort", 1)
        assert scheduler.abort(request) == []
        assert scheduler.session_tokens(7) == expected
    assert scheduler.stats()["owned_blocks"] == 0
    assert scheduler.end_session(7)
    assert not scheduler.end_session(7)


def test_tokens_that_do_not_fit_the_step_are_refused_and_nothing_is_booked() -> None:
    scheduler = Scheduler(**SIZES)
    scheduler.add([0], stopping=StopParams(max_tokens=1))
    assert scheduler.plan() is not None
    for tokens in ([], [1, 2], [30], [-1]):
        with pytest.raises(LmserveError) as caught:
            scheduler.commit(tokens)
        assert caught.value.status == 400
    (event,) = scheduler.commit(np.array([[1]]))
    assert event.finish_reason == "length"


@pytest.mark.parametrize(
    ("change", "param"),
    [({"block_size": 0}, "block_size"), ({"num_blocks": 2**30}, "num_blocks"), ({"max_batch": 0}, "max_batch_tokens")],
)
def test_impossible_sizes_are_refused(change: dict[str, int], param: str) -> None:
    with pytest.raises(LmserveError) as caught:
        Scheduler(**{**SIZES, **change})
    assert caught.value.error["param"] == param


def test_what_can_never_run_is_refused() -> None:
    scheduler = Scheduler(**SIZES)
    for prompt, stopping in [
        ([30], StopParams()),
        ([], StopParams()),
        ([1] * 49, StopParams()),
        ([1], StopParams(max_tokens=48)),
        ("text without a tokenizer", StopParams()),
        ([1], StopParams(stop=["x"])),
    ]:
        with pytest.raises(LmserveError) as caught:
            scheduler.add(prompt, stopping=stopping)
        assert caught.value.status == 400
    assert scheduler.plan() is None


def test_tenants_share_by_weight() -> None:
    scheduler = Scheduler(**SIZES, max_batch=1)
    scheduler.set_weight(2, 3)
    tenants = {
        scheduler.add([1, 2], tenant=tenant, stopping=StopParams(max_tokens=3)): tenant for tenant in [1, 2] * 12
    }
    ended = [tenants[event.request] for event in run(scheduler) if event.finish_reason]
    assert abs(ended[:12].count(2) - 9) <= 1
    with pytest.raises(LmserveError) as caught:
        scheduler.set_weight(2, 0)
    assert caught.value.error["param"] == "weight"


def test_it_needs_neither_torch_nor_litestar() -> None:
    script = (
        "import sys; sys.modules.update(torch=None, litestar=None)\n"
        "from lmserve import Scheduler\n"
        "Scheduler(num_blocks=1, block_size=1, vocab_size=1, max_model_len=1).plan()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
