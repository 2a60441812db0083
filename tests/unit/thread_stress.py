"""Four threads on one object of the core: `python thread_stress.py Scheduler`. A deadlock ends it with exit code 1.

Threads that wait for each other hold the GIL, so only a watchdog without it, in a process of its own, can end them.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from lmserve import LmserveError, Scheduler, StopParams, _core
from lmserve.engine.submission import Regex, SessionRef, Submission, Text, encode

sys.path += [str(Path(__file__).parents[1] / "http"), str(Path(__file__).parents[1] / "engine")]
from tiny_engine import EOS, FormulaRunner, byte_tokenizer, chat_template

THREADS = 4
ROUNDS = 150
DEADLINE = 120.0  # seconds until the process counts as deadlocked
TEXT = "four threads, one object " * 8
# One round of one thread; the number is the round's, distinct among all threads.
Round = Callable[[int], object]


def refused(call: Callable[[], object]) -> object:
    """What `call` gives; a refusal is an answer, too."""
    try:
        return call()
    except LmserveError as error:
        return error


def scheduler() -> Iterator[Round]:
    """Each grammar is a new one, so that it is compiled while the others plan, commit and count."""
    shared = Scheduler(
        num_blocks=4096,
        block_size=16,
        vocab_size=258,
        max_model_len=512,
        tokenizer=byte_tokenizer(),
        eos_token_ids=[EOS],
    )

    def step() -> None:
        planned = shared.plan()
        if planned is not None:
            if planned.masks is not None:
                planned.masks.wait()
            refused(lambda: shared.commit(np.full(len(planned.sample_rows), 97)))

    def one(number: int) -> None:
        guide = Regex(f"[a-z]{{1,{number % 97 + 1}}}{number}") if number % 3 == 0 else None
        stopping, session = StopParams(max_tokens=4), SessionRef(number % 5, create=True) if number % 4 == 1 else None
        request = refused(lambda: shared.add("x", guide=guide, stopping=stopping, session=session))
        shared.stats()
        step()
        if number % 7 == 0 and isinstance(request, int):
            shared.abort(request)
        refused(lambda: shared.end_session(number % 5))
        refused(lambda: shared.session_tokens(number % 5))
        if number % 11 == 0:
            shared.fail("out of luck")

    yield one


def engine() -> Iterator[Round]:
    """Engine and Stream: submit, read, leave, sessions, and every gauge."""
    shared = _core.Engine(FormulaRunner(), byte_tokenizer(), chat_template(), eos_token_ids=[EOS])

    def one(number: int) -> None:
        session = SessionRef(number % 5, create=True) if number % 2 else None
        guide = Regex(f"[a-z]{{1,9}}{number}") if number % 3 == 0 else None
        submission = Submission(
            input=Text("x"), stopping=StopParams(max_tokens=4), session=session, guide=guide, route="generate"
        )
        stream = refused(lambda: shared.submit(encode(submission)))
        if isinstance(stream, _core.Stream):
            while number % 5 and refused(stream.poll) == (0, b""):
                shared.drain()
            stream.abort()
        shared.stats(), shared.metrics(), shared.usage(0), shared.quota(0)
        refused(lambda: shared.session_info(0, number % 5))
        refused(lambda: shared.session_transcript(0, number % 5))
        refused(lambda: shared.fork_session(0, number % 5, 1000 + number))
        refused(lambda: shared.rewind_session(0, number % 5, 1))
        shared.list_sessions(0, -1, 10)
        shared.cancel_session(0, number % 5)
        refused(lambda: shared.end_session(0, number % 5, number % 2 == 0))

    yield one
    shared.shutdown(0.0)


def tokenizer() -> Iterator[Round]:
    shared = byte_tokenizer()

    def one(number: int) -> None:
        ids = shared.encode(TEXT * (number % 3), add_special=True)
        assert shared.decode(ids) == TEXT * (number % 3)
        assert shared.encode_continued(TEXT) == shared.encode(TEXT)
        assert shared.token_bytes(97) == b"a"

    yield one


def stream_decoder() -> Iterator[Round]:
    shared = _core.StreamDecoder(byte_tokenizer(), stop=["never said"])

    def one(number: int) -> None:
        shared.push(number % 258)
        shared.flush()

    yield one


def template() -> Iterator[Round]:
    shared = chat_template()
    messages = json.dumps([{"role": "user", "content": TEXT}]).encode()

    def one(_: int) -> None:
        assert TEXT in shared.render(messages)
        assert TEXT in shared.render_prompt(messages)
        assert TEXT in shared.render_continued(messages, open_assistant=True)
        shared.system_prefix(messages)

    yield one


def gguf_file() -> Iterator[Round]:
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("weight", np.ones((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        shared = _core.GgufFile(path)

        def one(_: int) -> None:
            assert shared.metadata()["general.architecture"] == shared.get("general.architecture") == "llama"
            assert len(shared.tensors()) == 1
            _core.GgufFile(path)

        yield one


def session_log() -> Iterator[Round]:
    """Only one thread opens a folder's log, and only one engine takes it."""
    with tempfile.TemporaryDirectory() as folder:
        logs: list[Any] = []

        def one(number: int) -> None:
            # Each that is refused waits for a second.
            if number % 20:
                return
            fields = {"folder": f"{folder}/{number // 20 % 7}", "fingerprint": bytes(32), "model": "m", "tenants": {}}
            settings = SimpleNamespace(**fields, fsync="never")
            found = refused(lambda: _core.OpenSessionLog(settings))
            if isinstance(found, _core.OpenSessionLog):
                logs.append(found)
            for log in logs[:7]:
                assert json.loads(log.restored)["sessions"] == 0

        yield one


def cpu_model() -> Iterator[Round]:
    """CpuModel, CpuProgram, CpuArrays and CpuTexts: steps run while programs are recorded and weights are taken."""
    import tiny_models
    from lmserve.model import RunnerOptions, load_runner, open_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        tiny_models.make(next(iter(tiny_models.CONFIGS)), Path(folder))
        options = RunnerOptions(device="cpu", ops="cpu", kv_memory=4 << 20, threads=2, max_batch=4, max_batch_tokens=64)
        runner: Any = load_runner(open_checkpoint(folder), options)
        model, program, head, arrays = runner.native
        runner.buffers.query_start[:2] = [0, 1]
        runner.buffers.context_lens[:1] = 1

        def one(number: int) -> None:
            if number >= 100:
                return  # steps keep their own threads busy, too
            model.run(program, head, arrays, 1, 1, 1)
            assert model.isa
            assert model.weight_bytes
            model.logits(1)
            if number % 10 == 0:
                model.add_norm(np.ones(64, np.float32), 1e-6)
            refused(lambda: _core.CpuProgram(model).embed(0, 1.0))
            bounds = np.array([0, 2], np.int32)
            runner.embed(np.array([1, 2], np.int32), bounds)

        yield one


CLASSES: dict[str, Callable[[], Iterator[Round]]] = {
    "Scheduler": scheduler,  # and Event, StepMasks
    "Engine": engine,  # and Stream
    "Tokenizer": tokenizer,
    "StreamDecoder": stream_decoder,
    "ChatTemplate": template,
    "GgufFile": gguf_file,
    "OpenSessionLog": session_log,
    "CpuModel": cpu_model,  # and CpuProgram, CpuArrays, CpuTexts
}


def main(name: str) -> None:
    sys.setswitchinterval(1e-6)
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    for one in CLASSES[name]():
        numbers, failed = itertools.count(), []

        def work(one: Round = one, numbers: Iterator[int] = numbers, failed: list[BaseException] = failed) -> None:
            try:
                for _ in range(ROUNDS):
                    one(next(numbers))
            except BaseException as error:  # noqa: BLE001 - told by the main thread
                failed.append(error)

        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(sys.argv[1])
