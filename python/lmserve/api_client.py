"""A client with the names of LMDeploy's: old scripts import `APIClient` from here and need no other change.

For an error, LMDeploy's methods yield the error object of the reply. Here it is raised as `LmserveError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import httpx
import msgspec

from lmserve.client import error_of, headers_of, timeout_of

Messages = str | Sequence[Mapping[str, Any]]
Reply = dict[str, Any]

DONE: Final = b"[DONE]"


def get_model_list(api_url: str, api_key: str | None = None) -> list[str]:
    """The names that `api_url`, an address of `/v1/models`, lists."""
    response = httpx.get(api_url, headers=headers_of(api_key), timeout=timeout_of(None))
    if not response.is_success:
        raise error_of(response)
    return [card["id"] for card in msgspec.json.decode(response.content)["data"]]


class APIClient:
    """LMDeploy's client. Every `_v1` method is a generator of replies: the chunks of a stream, or the one reply."""

    def __init__(self, api_server_url: str, api_key: str | None = None, **kwargs: Any) -> None:
        """`kwargs` are accepted but have no effect, as in LMDeploy."""
        del kwargs
        self.api_server_url = api_server_url.rstrip("/")
        self.api_key = api_key
        self._http = httpx.Client(headers=headers_of(api_key), timeout=timeout_of(None))
        self._available_models: list[str] | None = None

    @property
    def available_models(self) -> list[str]:
        """The names under which the model is served; asked for once."""
        if self._available_models is None:
            self._available_models = get_model_list(f"{self.api_server_url}/v1/models", self.api_key)
        return self._available_models

    def encode(
        self,
        input: str | list[str],  # noqa: A002 - LMDeploy's name
        do_preprocess: bool | None = False,
        add_bos: bool | None = True,
    ) -> tuple[list[Any], Any]:
        """Token ids and their number, or a list of each. `do_preprocess`: put the chat template around each text."""
        body = {"input": input, "do_preprocess": bool(do_preprocess), "add_bos": bool(add_bos)}
        (reply,) = self._post("/v1/encode", body)
        return reply["input_ids"], reply["length"]

    def chat_completions_v1(
        self,
        model: str,
        messages: Messages,
        temperature: float | None = 0.7,
        top_p: float | None = 1.0,
        n: int | None = 1,
        max_tokens: int | None = 512,
        stop: str | list[str] | None = None,
        stream: bool | None = False,
        presence_penalty: float | None = 0.0,
        frequency_penalty: float | None = 0.0,
        user: str | None = None,
        repetition_penalty: float | None = 1.0,
        session_id: int | str | None = -1,
        ignore_eos: bool | None = False,
        **kwargs: Any,
    ) -> Iterator[Reply]:
        """`/v1/chat/completions`; `kwargs` are further fields of its body."""
        body = {
            "model": model,
            "messages": messages,
            "temperature": temperature,
            "top_p": top_p,
            "n": n,
            "max_tokens": max_tokens,
            "stop": stop,
            "stream": stream,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "user": user,
            "repetition_penalty": repetition_penalty,
            "session_id": session_id,
            "ignore_eos": ignore_eos,
            **kwargs,
        }
        return self._post("/v1/chat/completions", body)

    def chat_interactive_v1(
        self,
        prompt: Messages,
        session_id: int | str = -1,
        interactive_mode: bool = False,
        stream: bool = False,
        stop: str | list[str] | None = None,
        request_output_len: int | None = 512,
        top_p: float = 0.8,
        top_k: int = 40,
        temperature: float = 0.8,
        repetition_penalty: float = 1.0,
        ignore_eos: bool = False,
        **kwargs: Any,
    ) -> Iterator[Reply]:
        """`/v1/chat/interactive`; `kwargs` are further fields of its body."""
        body = {
            "prompt": prompt,
            "session_id": session_id,
            "interactive_mode": interactive_mode,
            "stream": stream,
            "stop": stop,
            "request_output_len": request_output_len,
            "top_p": top_p,
            "top_k": top_k,
            "temperature": temperature,
            "repetition_penalty": repetition_penalty,
            "ignore_eos": ignore_eos,
            **kwargs,
        }
        return self._post("/v1/chat/interactive", body)

    def completions_v1(
        self,
        model: str,
        prompt: str | list[Any],
        suffix: str | None = None,
        temperature: float | None = 0.7,
        n: int | None = 1,
        max_tokens: int | None = 16,
        stream: bool | None = False,
        stop: str | list[str] | None = None,
        top_p: float | None = 1.0,
        top_k: int | None = 40,
        user: str | None = None,
        repetition_penalty: float | None = 1.0,
        session_id: int | str | None = -1,
        ignore_eos: bool | None = False,
        **kwargs: Any,
    ) -> Iterator[Reply]:
        """`/v1/completions`; `kwargs` are further fields of its body."""
        body = {
            "model": model,
            "prompt": prompt,
            "suffix": suffix,
            "temperature": temperature,
            "n": n,
            "max_tokens": max_tokens,
            "stream": stream,
            "stop": stop,
            "top_p": top_p,
            "top_k": top_k,
            "user": user,
            "repetition_penalty": repetition_penalty,
            "session_id": session_id,
            "ignore_eos": ignore_eos,
            **kwargs,
        }
        return self._post("/v1/completions", body)

    def embeddings_v1(
        self,
        model: str,
        input: str | list[Any],  # noqa: A002 - OpenAI's name
        user: str | None = None,
        **kwargs: Any,
    ) -> Reply:
        """`/v1/embeddings`: the one reply; `kwargs` are further fields of its body."""
        (reply,) = self._post("/v1/embeddings", {"model": model, "input": input, "user": user, **kwargs})
        return reply

    def chat(
        self,
        prompt: str,
        session_id: int | str,
        request_output_len: int = 512,
        stream: bool = False,
        top_p: float = 0.8,
        top_k: int = 40,
        temperature: float = 0.8,
        repetition_penalty: float = 1.0,
        ignore_eos: bool = False,
    ) -> Iterator[tuple[str, int, str | None]]:
        """(text, tokens, finish_reason) of a turn of a session that goes on. Raises ValueError for session -1."""
        if session_id == -1:
            raise ValueError("chat needs a session_id, but -1 was given, which means no session")
        replies = self.chat_interactive_v1(
            prompt,
            session_id=session_id,
            interactive_mode=True,
            stream=stream,
            request_output_len=request_output_len,
            top_p=top_p,
            top_k=top_k,
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            ignore_eos=ignore_eos,
        )
        for reply in replies:
            yield reply["text"], reply["tokens"], reply["finish_reason"]

    def end_session(self, session_id: int | str) -> None:
        """End a session; one that is unknown is no error."""
        for _ in self.chat_interactive_v1("", session_id=session_id, request_output_len=0):
            pass

    def _post(self, path: str, body: Mapping[str, Any]) -> Iterator[Reply]:
        with self._http.stream("POST", f"{self.api_server_url}{path}", json=body) as response:
            if not response.is_success:
                response.read()
                raise error_of(response)
            rest = b""
            for piece in response.iter_bytes():
                # httpx's own lines end at characters that may stand in a JSON string, too.
                *lines, rest = (rest + piece).split(b"\n")
                yield from _replies(lines)
            yield from _replies([rest])


def _replies(lines: Sequence[bytes]) -> Iterator[Reply]:
    for line in lines:
        data = line.removeprefix(b"data: ")
        if data and data != DONE:
            yield msgspec.json.decode(data)
