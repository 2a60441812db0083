"""`POST /tokenize`, `/detokenize` and `/v1/encode`: convert text to tokens and back, without running the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec
from litestar import Request, Response, get, post
from litestar.params import JSONBody
from msgspec import Struct

from lmserve.api.convert.chat_messages import conversation
from lmserve.api.convert.parameters import given_or
from lmserve.api.http.body import StrictJson
from lmserve.api.http.openapi import responses
from lmserve.api.http.serving import serving_of
from lmserve.engine.async_engine import AsyncEngine
from lmserve.engine.submission import Messages
from lmserve.engine.text import TextLayer
from lmserve.errors import LmserveError
from lmserve.schemas.tokenize import (
    DetokenizeReply,
    DetokenizeRequest,
    EncodeReply,
    EncodeRequest,
    TokenizeReply,
    TokenizeRequest,
    TokenizerInfoReply,
)

STATUSES: Final = (400, 401, 404, 408, 413, 429, 503)
# Characters that a template may write around a message.
MESSAGE_SIZE: Final = 64


@post(
    "/tokenize",
    dto=StrictJson[TokenizeRequest],
    return_dto=None,
    status_code=200,
    operation_id="tokenize",
    summary="Tokenize a text or a conversation",
    description="vLLM's route. Returns the token ids of a prompt, or of messages rendered with the chat template.",
    tags=["Tokens"],
    responses=responses(TokenizeReply, *STATUSES),
)
async def tokenize(data: JSONBody[TokenizeRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
    """Token ids, as the model would see them."""
    engine, text = text_of(request, data.model)
    if (data.prompt is None) == (data.messages is None):
        given = "neither" if data.prompt is None else "both"
        raise LmserveError.invalid("prompt", f"either prompt or messages must be given, but {given} was")
    with_strings = bool(data.return_token_strs)
    if data.prompt is not None:
        _refuse_template_fields(data)
        prompt, special = data.prompt, given_or(data.add_special_tokens, True)
        return await _reply(
            text,
            len(prompt),
            lambda: _tokens(engine, text, prompt, "prompt", special=special, with_strings=with_strings),
        )
    messages = conversation(data.messages or [], data)
    special = bool(data.add_special_tokens)
    return await _reply(
        text,
        size_of(messages),
        lambda: _tokens(
            engine, text, render_messages(text, messages), "messages", special=special, with_strings=with_strings
        ),
    )


@post(
    "/detokenize",
    dto=StrictJson[DetokenizeRequest],
    return_dto=None,
    status_code=200,
    operation_id="detokenize",
    summary="Turn token ids into text",
    description="vLLM's route. The text includes special tokens. Bytes that are not valid UTF-8 become U+FFFD.",
    tags=["Tokens"],
    responses=responses(DetokenizeReply, *STATUSES),
)
async def detokenize(data: JSONBody[DetokenizeRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
    """The text of token ids."""
    _, text = text_of(request, data.model)

    def work() -> DetokenizeReply:
        size = text.tokenizer.vocab_size
        unknown = next((token for token in data.tokens if token >= size), None)
        if unknown is not None:
            raise LmserveError.invalid("tokens", f"token ids must lie in [0, {size}), but {unknown} was given")
        return DetokenizeReply(text.tokenizer.decode(data.tokens, skip_special=False))

    return await _reply(text, len(data.tokens), work)


@get(
    "/tokenizer_info",
    operation_id="tokenizer_info",
    summary="Read the chat template and the special tokens",
    description="vLLM's route. lm-eval reads it to learn that it can tokenize on this server.",
    tags=["Tokens"],
    responses=responses(TokenizerInfoReply, 400, 401, 503),
)
async def tokenizer_info(request: Request[Any, Any, Any]) -> TokenizerInfoReply:
    """What the served tokenizer is."""
    engine, text = text_of(request, None)
    return TokenizerInfoReply(
        chat_template=text.template_source,
        bos_token=text.special_tokens.get("bos_token"),
        eos_token=text.special_tokens.get("eos_token"),
        pad_token=text.special_tokens.get("pad_token"),
        unk_token=text.special_tokens.get("unk_token"),
        model_max_length=engine.max_model_len,
    )


@post(
    "/v1/encode",
    dto=StrictJson[EncodeRequest],
    return_dto=None,
    status_code=200,
    operation_id="encode",
    summary="Tokenize texts",
    description="LMDeploy's route. Returns the token ids of one or several texts, and their number.",
    tags=["Tokens"],
    responses=responses(EncodeReply, *STATUSES),
)
async def encode(data: JSONBody[EncodeRequest], request: Request[Any, Any, Any]) -> Response[bytes]:
    """Token ids of each text."""
    engine, text = text_of(request, data.model)
    if data.do_preprocess and not data.add_bos:
        message = "add_bos false cannot be combined with do_preprocess: the chat template writes its own tokens"
        raise LmserveError.invalid("add_bos", message, "unsupported_parameter")

    def ids_of(given: str) -> list[int]:
        most = engine.max_model_len
        if not data.do_preprocess:
            return text.encode(given, context_length=most, param="input", add_special=data.add_bos)
        rendered = render_messages(text, Messages([{"role": "user", "content": given}]))
        return text.encode(rendered, context_length=most, param="input", rendered=True)

    def work() -> EncodeReply:
        if isinstance(data.input, str):
            ids = ids_of(data.input)
            return EncodeReply(ids, len(ids))
        lists = [ids_of(given) for given in data.input]
        return EncodeReply(lists, [len(ids) for ids in lists])

    size = len(data.input) if isinstance(data.input, str) else sum(MESSAGE_SIZE + len(given) for given in data.input)
    return await _reply(text, size, work)


def text_of(request: Request[Any, Any, Any], model: str | None) -> tuple[AsyncEngine, TextLayer]:
    """The engine and its text layer. Raises LmserveError (404, 400) for another model, or one without a tokenizer."""
    serving = serving_of(request)
    engine = serving.engine
    if model:
        serving.check_model(model)
    if engine.text is None:
        raise LmserveError.invalid("model", "the served model has no tokenizer", "unsupported_parameter")
    return engine, engine.text


def size_of(messages: Messages) -> int:
    """About how many characters they are once rendered."""
    written = [message["tool_calls"] for message in messages.messages if "tool_calls" in message]
    beside = len(msgspec.json.encode([written, messages.tools]))
    return beside + sum(MESSAGE_SIZE + len(message["content"]) for message in messages.messages)


async def _reply(text: TextLayer, size: int, work: Callable[[], Struct]) -> Response[bytes]:
    # A list of a million ids is not written on the event loop either.
    body = await text.run(size, lambda: msgspec.json.encode(work()))
    return Response(body, media_type="application/json")


def _refuse_template_fields(data: TokenizeRequest) -> None:
    for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
        if getattr(data, name) is not None:
            raise LmserveError.invalid(name, f"{name} needs messages, but a prompt was given")


def render_messages(text: TextLayer, messages: Messages) -> str:
    """The conversation as the model sees it. Raises LmserveError (400) for a model without a template."""
    if text.template is None:
        raise LmserveError.invalid("messages", "this model has no chat template; give a prompt")
    return text.template.render_prompt(
        msgspec.json.encode(messages.messages),
        tools=None if messages.tools is None else msgspec.json.encode(messages.tools),
        add_generation_prompt=given_or(messages.add_generation_prompt, True),
        continue_final_message=messages.continue_final_message,
        kwargs=msgspec.json.encode(messages.template_kwargs),
    )


def _tokens(
    engine: AsyncEngine, text: TextLayer, prompt: str, param: str, *, special: bool, with_strings: bool
) -> TokenizeReply:
    most, rendered = engine.max_model_len, param == "messages"
    ids = text.encode(prompt, context_length=most, param=param, add_special=special, rendered=rendered)
    strings = None
    if with_strings:
        strings = [(text.tokenizer.token_bytes(token) or b"").decode(errors="replace") for token in ids]
    return TokenizeReply(count=len(ids), max_model_len=engine.max_model_len, tokens=ids, token_strs=strings)
