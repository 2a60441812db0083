"""The whole engine - Rust core, torch model loop, asyncio face - over tiny random models and the default tokenizer."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import thorough
import transformers
from lmserve import _core
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.submission import Messages, SamplingParams, SessionRef, StopParams, Submission, Text, Tokens, Turn
from lmserve.errors import LmserveError
from lmserve.model import RunnerOptions, load_runner, open_checkpoint

EOS = 2


@pytest.fixture(scope="module")
def text_layer(smollm2_gguf):
    """Tokenizer and chat template of the default model."""
    checkpoint = open_checkpoint(smollm2_gguf)
    special_tokens = json.dumps(checkpoint.special_tokens).encode()
    return checkpoint.tokenizer(), _core.ChatTemplate(checkpoint.chat_template, special_tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with random weights and the default model's vocabulary: it emits much that is no UTF-8."""
    path = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    transformers.set_seed(5)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def start(folder, text_layer, **options) -> _core.Engine:
    options = {"max_batch": 16, "max_batch_tokens": 128, "kv_memory": 16 << 20, "ops": "torch"} | options
    runner = load_runner(open_checkpoint(folder), RunnerOptions(**options))
    return _core.Engine(runner, *text_layer, eos_token_ids=[EOS])


@pytest.fixture(scope="module")
def core(folder, text_layer):
    engine = start(folder, text_layer)
    yield engine
    engine.shutdown(5)


@pytest.fixture
def run(core):
    """Runs a coroutine function over an AsyncEngine; afterwards nothing of its requests may be left."""

    def runner(work, engine=core):
        async def main():
            face = AsyncEngine(engine, max_model_len=engine.context_length)
            before = open_files()
            try:
                result = await work(face)
                await baseline(engine)
                assert face.open_streams == 0
                assert len(asyncio.all_tasks()) == 1
                assert open_files() == before
                return result
            finally:
                face.close()

        return asyncio.run(main())

    return runner


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def baseline(core) -> None:
    deadline = time.monotonic() + 20
    while True:
        stats = core.stats()
        if stats["open_requests"] == stats["running"] == stats["waiting"] == stats["owned_blocks"] == 0:
            return
        assert time.monotonic() < deadline, stats
        await asyncio.sleep(0.002)


def submission(
    prompt, max_tokens: int, *, stream: bool = False, session=None, stop=(), stop_ids=(), **sampling
) -> Submission:
    return Submission(
        route="generate",
        model="tiny",
        input=prompt,
        stream=stream,
        session=session,
        sampling=SamplingParams(**({"temperature": 0.0} | sampling)),
        stopping=StopParams(max_tokens=max_tokens, stop=list(stop), stop_token_ids=list(stop_ids), ignore_eos=True),
    )


async def answer(face, request: Submission) -> dict:
    """The reply as one object, with the deltas of a stream joined."""
    stream = face.submit(request)
    if not request.stream:
        return json.loads(await stream.body())
    await stream.opened()
    data = b"".join([chunk async for chunk in stream.chunks()])
    assert data.endswith(b"\0")
    frames = [json.loads(frame) for frame in data[:-1].split(b"\0")]
    assert all(frame["finish_reason"] is None for frame in frames[:-1])
    counts = [frame["tokens"] for frame in frames]
    assert counts == sorted(counts)
    return frames[-1] | {"text": "".join(frame["text"] for frame in frames)}


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join(
        rng.choice(["alpha", "beta", "gamma", "delta", "你好", "naïve", "🙂", "x=1;"]) for _ in range(count)
    )


def test_the_deltas_of_a_stream_are_the_whole_text(run):
    count = thorough.of(60, 300)

    async def work(face):
        async def both(seed):
            prompt = Text(words(seed, 1 + seed % 7))
            sampling = {"temperature": 1.0, "top_k": 64, "seed": seed}
            whole = await answer(face, submission(prompt, 24, **sampling))
            streamed = await answer(face, submission(prompt, 24, stream=True, **sampling))
            assert streamed["text"] == whole["text"]
            assert streamed["tokens"] == whole["tokens"] == 24
            return whole["text"]

        return await asyncio.gather(*[both(seed) for seed in range(count)])

    texts = run(work)
    assert len(set(texts)) == count
    assert sum("\ufffd" in text for text in texts) > count / 15, "the model should emit invalid UTF-8"


def test_64_streams_finish_with_the_text_they_give_alone(run):
    requests = [
        submission(Text(words(seed, 1 + seed * 3)), 5 + seed % 40, stream=True, temperature=float(seed % 2), seed=seed)
        for seed in range(64)
    ]

    async def together(face):
        return await asyncio.gather(*[answer(face, request) for request in requests])

    async def alone(face):
        return [await answer(face, request) for request in requests]

    for one, other in zip(run(together), run(alone), strict=True):
        assert (one["text"], one["tokens"]) == (other["text"], other["tokens"])


def test_a_conversation_is_that_of_its_token_history_sent_whole(run, core, text_layer):
    tokenizer, template = text_layer

    async def work(face):
        history = []
        for turn in range(6):
            session = SessionRef(id=3, start=turn == 0)
            reply = await answer(face, submission(Turn(words(turn, 4)), 20, session=session))
            message = json.dumps([{"role": "user", "content": words(turn, 4)}]).encode()
            rendered = template.render_continued(message, open_assistant=True) if turn else template.render(message)
            prompt = history + tokenizer.encode(rendered)
            usage = reply["usage"]
            assert usage["prompt_tokens"] == len(prompt)
            assert usage["history_tokens"] == len(history)
            # The last token of a turn was sampled and never computed.
            assert usage["cached_tokens"] == max(len(history) - 1, 0)
            core_tokens = core.session_tokens(0, 3)
            whole = await answer(face, submission(Tokens(prompt), 20))
            assert whole["text"] == reply["text"]
            assert core_tokens[: len(prompt)] == prompt
            assert len(core_tokens) == len(prompt) + 20
            history = core_tokens
        assert await face.end_session(0, 3)

    run(work)


@pytest.mark.parametrize("stream", [False, True])
def test_200_clients_that_leave_leave_nothing_behind(run, stream):
    async def work(face):
        rng = random.Random(1)

        async def leave(seed):
            session = SessionRef(id=seed) if seed % 3 == 0 else None
            if session is not None:
                session = SessionRef(id=seed, start=True, on_disconnect="keep" if seed % 2 else "rollback")
            reply = face.submit(submission(Text(words(seed, 20)), 200, stream=stream, session=session))
            await asyncio.sleep(rng.random() * 0.05)
            reply.abort()

        for batch in range(0, 200, 20):
            await asyncio.gather(*[leave(seed) for seed in range(batch, batch + 20)])
        await baseline(face._core)
        for seed in range(200):
            await face.end_session(0, seed)

    run(work)


def test_a_pool_too_small_for_all_preempts_and_changes_no_token(folder, text_layer, run, core):
    # After short answers short ones are expected, and more join than there is room for.
    short = submission(Text(words(9, 2)), 60, stop_ids=[7], logit_bias=[(7, 100.0)])
    never = {"stop_ids": [7], "logit_bias": [(7, -100.0)]}
    requests = [submission(Text(words(seed, 12)), 60, stream=True, **never) for seed in range(8)]

    async def work(face):
        await asyncio.gather(*[answer(face, short) for _ in range(20)])
        return await asyncio.gather(*[answer(face, request) for request in requests])

    kv_bytes_per_block = 2 * 2 * 2 * 8 * 4 * 16
    small = start(folder, text_layer, kv_memory=kv_bytes_per_block * 18, max_model_len=200)
    try:
        assert [reply["text"] for reply in run(work, small)] == [reply["text"] for reply in run(work)]
        assert small.stats()["preemptions"] > 0
    finally:
        small.shutdown(5)


def test_a_stop_string_ends_the_text_wherever_its_tokens_fall(run):
    async def work(face):
        for seed in range(20):
            whole = await answer(face, submission(Text(words(seed, 3)), 30))
            text = whole["text"]
            for start_at in (3, len(text) // 2):
                stop = text[start_at : start_at + 5]
                reply = await answer(face, submission(Text(words(seed, 3)), 30, stream=True, stop=[stop]))
                assert reply["text"] == text[: text.index(stop)]
                assert reply["finish_reason"] == "stop"

    run(work)


def test_a_prefilled_conversation_is_continued_by_its_next_turn(run, core, text_layer):
    tokenizer, template = text_layer
    messages = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello Ada!"},
    ]
    question = {"role": "user", "content": "Who am I?"}

    async def work(face):
        prefill = await answer(face, submission(Messages(messages), 0, session=SessionRef(id=9, start=True)))
        assert (prefill["text"], prefill["tokens"]) == ("", 0)
        reply = await answer(face, submission(Turn("Who am I?"), 12, session=SessionRef(id=9)))
        whole = tokenizer.encode(template.render(json.dumps([*messages, question]).encode()))
        assert core.session_tokens(0, 9)[:-12] == whole
        assert reply["text"] == (await answer(face, submission(Tokens(whole), 12)))["text"]
        assert reply["usage"]["cached_tokens"] == prefill["usage"]["prompt_tokens"]
        await face.end_session(0, 9)

    run(work)


def test_an_empty_prompt_continues_the_answer(run, core):
    async def work(face):
        await answer(face, submission(Turn("Go on"), 10, session=SessionRef(id=4, start=True)))
        more = await answer(face, submission(Turn(""), 10, session=SessionRef(id=4)))
        assert more["usage"]["prompt_tokens"] == more["usage"]["history_tokens"]
        tokens = core.session_tokens(0, 4)
        await face.end_session(0, 4)
        await answer(face, submission(Turn("Go on"), 20, session=SessionRef(id=4, start=True)))
        assert core.session_tokens(0, 4) == tokens
        await face.end_session(0, 4)

    run(work)


def test_what_the_model_is_asked_wrongly_is_refused_with_what_and_the_limit(run, core):
    cases = [
        (submission(Tokens([49152]), 1), "49152"),
        (submission(Tokens([]), 1), "at least one"),
        (submission(Text("x" * 9000), 1), str(core.context_length)),
        (submission(Text("x"), 5000), "5000"),
        (submission(Messages([{"role": "user"}]), 1), ""),
        (submission(Messages([{"content": 5, "role": ["x"]}]), 1), ""),
    ]

    async def work(face):
        for request, word in cases:
            with pytest.raises(LmserveError) as caught:
                await answer(face, request)
            assert caught.value.status == 400
            assert word in str(caught.value)
        assert (await answer(face, submission(Text("still here"), 3)))["tokens"] == 3

    run(work)


def test_seeded_sampling_and_penalties_do_not_depend_on_the_batch(run):
    odd = {"temperature": 1.0, "seed": 11, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    request = submission(Text(words(1, 9)), 40, top_k=50, top_p=0.9, min_p=0.01, logit_bias=[(7, 2.0)], **odd)

    async def alone(face):
        return await answer(face, request)

    async def crowded(face):
        others = [answer(face, submission(Text(words(s, s)), 30, temperature=1.0)) for s in range(2, 17)]
        return (await asyncio.gather(answer(face, request), *others))[0]

    assert run(alone)["text"] == run(crowded)["text"]


def test_shutdown_lets_turns_end_and_is_quick_when_idle(folder, text_layer):
    engine = start(folder, text_layer)

    async def work():
        face = AsyncEngine(engine, max_model_len=engine.context_length)
        pending = asyncio.create_task(answer(face, submission(Text("a"), 100, stream=True)))
        await asyncio.sleep(0.05)
        await face.shutdown(20)
        assert (await pending)["tokens"] == 100
        with pytest.raises(LmserveError) as caught:
            face.submit(submission(Text("a"), 1))
        assert caught.value.status == 503

    asyncio.run(work())


def test_a_program_that_ends_with_a_running_turn_ends_cleanly(folder, smollm2_gguf):
    script = f"""
import json, time
from lmserve import _core
from lmserve.model import RunnerOptions, load_runner, open_checkpoint
runner = load_runner(open_checkpoint({str(folder)!r}), RunnerOptions(kv_memory=16 << 20, ops="torch"))
engine = _core.Engine(runner, open_checkpoint({str(smollm2_gguf)!r}).tokenizer(), None, eos_token_ids=[])
request = {{"route": "generate", "input": {{"type": "tokens", "ids": [1]}}, "stopping": {{"max_tokens": 1000}}}}
stream = engine.submit(json.dumps(request).encode())
while engine.stats()["steps"] < 3:
    time.sleep(0.01)
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (3, "")
