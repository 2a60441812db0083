"""The sampler against a naive one, row by row in numpy, and that no row sees another."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lmserve.model import sampler
from lmserve.model.interface import MAX_LOGPROBS, LogitEdits
from lmserve.model.sampler import SamplingRows, sample, token_logprobs

PLAIN = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "uniform": 0.0,
}


def rows_of(parameters: list[dict]) -> SamplingRows:
    columns = {}
    for name, default in PLAIN.items():
        dtype = np.int32 if name == "top_k" else np.float32
        columns[name] = np.array([row.get(name, default) for row in parameters], dtype)
    return SamplingRows(**columns)


def extras_of(biases: list[dict[int, float]], seen: list[dict[int, int]]) -> LogitEdits:
    def ragged(rows):
        start = np.cumsum([0, *(len(row) for row in rows)]).astype(np.int32)
        tokens = np.array([token for row in rows for token in row], np.int32)
        return start, tokens, [value for row in rows for value in row.values()]

    bias_start, bias_token, bias_value = ragged(biases)
    seen_start, seen_token, seen_count = ragged(seen)
    return LogitEdits(
        bias_start,
        bias_token,
        np.array(bias_value, np.float32),
        seen_start,
        seen_token,
        np.array(seen_count, np.int32),
    )


def naive(logits: np.ndarray, row: dict, bias: dict[int, float], seen: dict[int, int]) -> tuple[int, float]:
    """The sampled token, and how far the draw is from the nearest border between tokens."""
    row = PLAIN | row
    values = logits.astype(np.float32).copy()
    for token, count in seen.items():
        penalty = np.float32(row["repetition_penalty"])
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
        values[token] -= np.float32(count) * np.float32(row["frequency_penalty"])
        values[token] -= np.float32(count > 0) * np.float32(row["presence_penalty"])
    for token, value in bias.items():
        values[token] += np.float32(value)
    if row["temperature"] == 0:
        return int(values.argmax()), np.inf
    values = (values - values.max()) / np.float32(row["temperature"])
    kept = np.ones(len(values), bool)
    if row["top_k"]:
        kept &= values >= np.sort(values)[::-1][min(row["top_k"], len(values)) - 1]
    margin = np.inf
    if row["top_p"] < 1:
        order = np.argsort(-values, kind="stable")
        order = order[kept[order]]
        mass = np.cumsum(np.exp(values[order].astype(np.float64)))
        wanted = float(np.float32(row["top_p"])) * mass[-1]
        margin = np.abs(mass - wanted).min() / mass[-1]
        kept &= values >= values[order[int((mass < wanted).sum())]]
    kept &= values >= np.log(np.float32(row["min_p"])) if np.float32(row["min_p"]) else True
    mass = np.cumsum(np.where(kept, np.exp(values.astype(np.float64)), 0))
    target = float(np.float32(row["uniform"])) * mass[-1]
    margin = min(margin, np.abs(mass - target).min() / mass[-1])
    return int(np.searchsorted(mass, target, side="right")), margin


ROW = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0.05, 5.0),
        "top_k": st.sampled_from([1, 2, 5, 40, 600, 5000]),
        "top_p": st.floats(0.01, 1.0),
        "min_p": st.floats(0.0, 1.0),
        "repetition_penalty": st.floats(0.5, 2.0),
        "presence_penalty": st.floats(-2.0, 2.0),
        "frequency_penalty": st.floats(-2.0, 2.0),
        "uniform": st.floats(0.0, 1.0, exclude_max=True, width=32),
    },
)


def random_logits(seed: int, n: int, vocab: int, *, ties: bool) -> np.ndarray:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, generator.uniform(0.1, 6), (n, vocab)).astype(np.float32)
    return np.round(logits * 2) / 2 if ties else logits


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(ROW, min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    vocab=st.sampled_from([7, 100, 2000]),
    ties=st.booleans(),
    with_extras=st.booleans(),
)
def test_equals_the_naive_sampler(rows, seed, vocab, ties, with_extras):
    logits = random_logits(seed, len(rows), vocab, ties=ties)
    generator = np.random.default_rng(seed)
    biases = [{} for _ in rows]
    seen = [{} for _ in rows]
    if with_extras:
        for row in range(len(rows)):
            for token in generator.choice(vocab, generator.integers(0, 6), replace=False):
                biases[row][int(token)] = float(generator.choice([-np.inf, -3.0, 4.5]))
            for token in generator.choice(vocab, generator.integers(0, 6), replace=False):
                seen[row][int(token)] = int(generator.integers(0, 4))
    tensor = torch.from_numpy(logits.copy())
    found = sample(tensor, rows_of(rows), extras_of(biases, seen) if with_extras else None)
    assert np.array_equal(tensor.numpy(), logits)
    for index, row in enumerate(rows):
        token, margin = naive(logits[index], row, biases[index], seen[index])
        # Where a draw falls on the border of two tokens, rounding may decide.
        if margin > 1e-5:
            assert found[index] == token


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert sample(logits, rows_of([{}, {}]), None).tolist() == [1, 0]


def test_a_row_does_not_depend_on_its_neighbours():
    generator = np.random.default_rng(3)
    logits = random_logits(3, 24, 3000, ties=False)
    kinds = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.8},
        {"temperature": 1.5, "top_p": 0.99},
        {"temperature": 0.9, "top_k": 1000},
        {"temperature": 1.0, "min_p": 0.05},
        {},
        {"repetition_penalty": 1.3},
        {"temperature": 2.0, "frequency_penalty": 0.7, "top_k": 3},
    ]
    rows = [kinds[i % len(kinds)] | {"uniform": float(generator.random(dtype=np.float32))} for i in range(24)]
    seen = [{int(t): 1 for t in generator.choice(3000, 5)} if i % 8 > 5 else {} for i in range(24)]
    biases = [{7: 2.0} if i % 5 == 0 else {} for i in range(24)]
    together = sample(torch.from_numpy(logits), rows_of(rows), extras_of(biases, seen))
    for i in generator.permutation(24):
        alone = sample(torch.from_numpy(logits[i : i + 1]), rows_of([rows[i]]), extras_of([biases[i]], [seen[i]]))
        assert alone[0] == together[i]
    order = generator.permutation(24)
    shuffled = sample(
        torch.from_numpy(logits[order]),
        rows_of([rows[i] for i in order]),
        extras_of([biases[i] for i in order], [seen[i] for i in order]),
    )
    assert shuffled.tolist() == together[order].tolist()


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1e4, 0.5]])
    draws = 4000
    uniforms = (np.arange(draws) + 0.5) / draws
    rows = rows_of([{"temperature": 2.0, "uniform": float(u)} for u in uniforms])
    found = sample(logits.expand(draws, -1), rows, None)
    frequencies = np.bincount(found.numpy(), minlength=5) / draws
    np.testing.assert_allclose(frequencies, torch.softmax(logits[0] / 2, -1).numpy(), atol=1e-3)


def test_a_nucleus_wider_than_the_first_look_is_sorted_whole(monkeypatch):
    logits = random_logits(1, 3, 3000, ties=False) * 0.1
    rows = rows_of([{"temperature": 1.0, "top_p": 0.97, "uniform": u} for u in (0.1, 0.5, 0.999)])
    found = sample(torch.from_numpy(logits), rows, None)
    monkeypatch.setattr(sampler, "NUCLEUS_WIDTH", 3000)
    assert sample(torch.from_numpy(logits), rows, None).tolist() == found.tolist()


def test_a_row_with_every_token_forbidden_still_gives_a_token():
    edits = extras_of([dict.fromkeys(range(4), -np.inf)] * 2, [{}, {}])
    found = sample(torch.zeros(2, 4), rows_of([{"temperature": 1.0, "uniform": 0.5}, {}]), edits)
    assert ((found >= 0) & (found < 4)).all()


@pytest.mark.parametrize("vocab", [5, 300])
def test_logprobs_are_of_the_raw_logits(vocab):
    logits = torch.from_numpy(random_logits(9, 4, vocab, ties=True))
    sampled = torch.tensor([0, 1, 2, 3])
    own, ids, values = token_logprobs(logits, sampled)
    expected = torch.log_softmax(logits, -1).numpy()
    np.testing.assert_allclose(own.numpy(), expected[np.arange(4), sampled.numpy()], rtol=1e-6)
    assert ids.shape == values.shape == (4, MAX_LOGPROBS)
    width = min(vocab, MAX_LOGPROBS)
    for row in range(4):
        np.testing.assert_allclose(values[row, :width], np.sort(expected[row])[::-1][:width], rtol=1e-6)
        np.testing.assert_allclose(expected[row][ids[row, :width].numpy()], values[row, :width].numpy(), rtol=1e-6)
        for i in range(width - 1):
            assert values[row, i] > values[row, i + 1] or ids[row, i] < ids[row, i + 1]
    assert torch.isinf(values[:, width:]).all()
