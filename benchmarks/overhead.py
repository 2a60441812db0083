"""What serving costs without the model: a runner that returns at once, under the real engine, HTTP server and clients.

    .venv/bin/python benchmarks/overhead.py

Server and clients are processes of their own, pinned to a core each. The default model's tokenizer is used (`lmserve
fetch`), and none of its weights.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe

import numpy as np
import uvloop
from lmserve import _core
from lmserve.app import create_app
from lmserve.assets import SMOLLM2, fetch
from lmserve.bench.http import Target
from lmserve.bench.load import Load, Run, discover
from lmserve.bench.workload import WORDS, Turn, Workload
from lmserve.config import GIB, ServeConfig
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.load import ModelPlan
from lmserve.engine.submission import StopParams, Submission, Tokens, encode
from lmserve.model.interface import F32, I32, LogitEdits
from lmserve.model.runner import allocate_buffers, runner_info
from lmserve.server import bind, serve, url_of

STREAMS = 64
TOKENS = 2000  # of each stream
PAUSE = 0.004  # seconds of a step, where one takes a time

# What an event of /v1/completions looks like, for the server that measures the client.
EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1700000000,'
    b'"model":"m","choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null}],"usage":null}\n\n'
)
LAST = (
    b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":%d}}\n\ndata: [DONE]\n\n' % TOKENS
)


class InstantRunner:
    """Computes nothing: each row's token was chosen beforehand. A step takes `pause` seconds."""

    def __init__(self, plan: ModelPlan, pause: float) -> None:
        self.pause = pause
        self.info = runner_info(plan.checkpoint, plan.memory, weight_bytes=0)
        self.buffers = allocate_buffers(plan.memory)
        words = [plan.text.tokenizer.encode(f" {word}")[0] for word in WORDS]
        self.buffers.sampled[:] = np.resize(words, self.buffers.sampled.shape)

    def launch(self, n_tokens: int, n_seqs: int, n_rows: int, edits: LogitEdits | None) -> None:
        pass

    def collect(self) -> None:
        if self.pause:
            time.sleep(self.pause)

    def embed(self, token_ids: I32, cu_seqlens: I32) -> F32:
        raise NotImplementedError


def instant_engine(pause: float = 0.0) -> _core.Engine:
    config = ServeConfig(max_batch=STREAMS, max_model_len=4096, kv_memory=32 * GIB)
    plan = ModelPlan(fetch(SMOLLM2), config)
    return _core.Engine(
        InstantRunner(plan, pause), plan.text.tokenizer, plan.text.template, eos_token_ids=plan.checkpoint.eos_token_ids
    )


def measure_engine() -> tuple[float, float]:
    """Microseconds of the process's time for a step of 64 decoding sequences, and of the clock."""
    engine = instant_engine()
    stopping = StopParams(max_tokens=TOKENS, ignore_eos=True)
    streams = []
    for at in range(STREAMS):
        prompt = Tokens([at + 1] * 100)
        submission = Submission(
            route="completions", reply_id=f"cmpl-{at:032}", model="m", input=prompt, stream=True, stopping=stopping
        )
        streams.append(engine.submit(encode(submission)))
    while engine.stats()["running"] < STREAMS:
        time.sleep(0.001)
    steps, cpu, clock = engine.stats()["steps"], time.process_time(), time.perf_counter()
    # Long before the first of them ends.
    while engine.stats()["steps"] - steps < TOKENS // 2:
        time.sleep(0.02)
    cpu, clock, steps = time.process_time() - cpu, time.perf_counter() - clock, engine.stats()["steps"] - steps
    running = engine.stats()["running"]
    engine.shutdown(0)
    if running != STREAMS:
        raise RuntimeError(f"only {running} of {STREAMS} sequences were running at the end")
    return cpu / steps * 1e6, clock / steps * 1e6


def serve_engine(pipe: Pipe, pause: float = 0.0) -> None:
    """The real server; it sends its URL, and its processor time whenever asked."""
    core = instant_engine(pause)
    app = create_app(AsyncEngine(core, max_model_len=core.context_length), ["m"])
    listener = bind("127.0.0.1", 0)
    answer_in_thread(pipe, url_of(listener))
    serve(app, listener)


def answer_in_thread(pipe: Pipe, url: str) -> None:
    """Send the URL, and then the processor time of this process whenever something comes."""

    def answer() -> None:
        pipe.send(url)
        while True:
            pipe.recv()
            pipe.send(time.process_time())

    threading.Thread(target=answer, daemon=True).start()


def serve_events(pipe: Pipe) -> None:
    """A server that only writes events, one a chunk: what the client can take."""

    class Writer(asyncio.Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            if data.startswith(b"GET"):
                body = b'{"data":[{"id":"m"}]}'
                self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                return
            self.transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            self.left = TOKENS
            asyncio.get_running_loop().call_soon(self.write)

        def write(self) -> None:
            self.left -= 1
            event = EVENT if self.left else EVENT + LAST
            self.transport.write(b"%x\r\n%s\r\n" % (len(event), event))
            if self.left:
                asyncio.get_running_loop().call_soon(self.write)
            else:
                self.transport.write(b"0\r\n\r\n")

    async def run() -> None:
        listener = bind("127.0.0.1", 0)
        server = await asyncio.get_running_loop().create_server(Writer, sock=listener)
        answer_in_thread(pipe, url_of(listener))
        await server.serve_forever()

    uvloop.run(run())


async def stream_tokens(url: str) -> Run:
    server = await discover(Target(url), model=None, patience=60)
    workload = Workload("overhead", "", "completions", (STREAMS,), lambda *_: [])
    conversations = [(Turn(f"{WORDS[at]} and so on", TOKENS),) for at in range(STREAMS)]
    return await Load(server, workload, STREAMS, conversations, first_session=0).run()


def serve_paced_engine(pipe: Pipe) -> None:
    """The real server under a model whose step takes a time, so that each token is sent by itself."""
    serve_engine(pipe, PAUSE)


def measure_http(target: Callable[[Pipe], None], cores: tuple[int, int]) -> None:
    """Stream tokens from a server in a process of its own, on the first of `cores`, and print what it came to."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=pinned, args=(target, theirs, cores[0]), daemon=True)
    process.start()
    try:
        url = ours.recv()
        uvloop.run(stream_tokens(url))  # the first round finds code and memory cold
        ours.send("time")
        server, client = ours.recv(), time.process_time()
        run = uvloop.run(stream_tokens(url))
        client = time.process_time() - client
        ours.send("time")
        server = ours.recv() - server
    finally:
        process.kill()
        process.join()
    errors = {outcome.error for outcome in run.outcomes if outcome.error is not None}
    if errors:
        raise RuntimeError(f"requests failed: {errors}")
    tokens, reads = STREAMS * TOKENS, sum(len(set(outcome.arrivals)) for outcome in run.outcomes)
    print(f"  {tokens / run.elapsed:9,.0f} tokens/s to {STREAMS} clients, {tokens / reads:.1f} tokens a read")
    for who, seconds in (("server", server), ("client", client)):
        share = seconds / run.elapsed
        print(f"  {tokens / seconds:9,.0f} tokens per second of the {who}'s processor time, {share:.0%} of a core")


def pinned(target: Callable[[Pipe], None], pipe: Pipe, core: int) -> None:
    """Run `target` on one core."""
    os.sched_setaffinity(0, {core})
    target(pipe)


def main() -> None:
    """Print all measurements."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit("two cores are needed: one for the server, one for its clients")
    cpu, clock = measure_engine()
    print(
        f"engine, {STREAMS} sequences decoding, no reader: {cpu:.0f} us of processor time a step, {clock:.0f} us in all"
    )
    os.sched_setaffinity(0, {cores[1]})
    for what, target in (
        ("what the clients can take, from a server that only writes:", serve_events),
        ("engine, HTTP server and clients:", serve_engine),
        (f"the same, where a step takes {1e3 * PAUSE:g} ms and each token is sent by itself:", serve_paced_engine),
    ):
        print(what)
        measure_http(target, (cores[0], cores[1]))


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
