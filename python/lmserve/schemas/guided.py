"""What an answer's text must be: OpenAI's `response_format`, and vLLM's names for the rest."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from lmserve.schemas.bounds import Tag, Text
from lmserve.schemas.sampling import SamplingRequest

# Bounds of memory: what compiling may cost has limits of its own, in the core.
MAX_GUIDE_CHARS = 4_194_304
MAX_GUIDE_CHOICES = 65536

GuideText = Annotated[str, Meta(min_length=1, max_length=MAX_GUIDE_CHARS)]
GuideChoices = Annotated[
    list[Annotated[str, Meta(min_length=1, max_length=MAX_GUIDE_CHARS)]],
    Meta(min_length=1, max_length=MAX_GUIDE_CHOICES),
]
# A JSON schema as a text: that it is one is for the server to find.
SchemaText = Annotated[
    GuideText,
    Meta(extra_json_schema={"contentMediaType": "application/json", "contentSchema": {"type": "object"}}),
]
# What its keywords hold is bounded by the body, and by what compiling it may cost.
JsonSchema = Annotated[dict[str, Any], Meta(max_length=1024)]


class TextFormat(Struct, tag_field="type", tag="text", frozen=True, forbid_unknown_fields=True):
    """Any text."""


class JsonObjectFormat(
    Struct, tag_field="type", tag="json_object", frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """One JSON object."""

    schema: Annotated[JsonSchema | None, Meta(description="What it must be, as llama.cpp takes it.")] = None


class NamedSchema(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON schema, and its name."""

    name: Annotated[Tag | None, Meta(description="Of no effect.")] = None
    description: Annotated[Text | None, Meta(description="Of no effect.")] = None
    schema: Annotated[JsonSchema | bool | None, Meta(description="Null: any JSON object; true: any JSON.")] = None
    strict: Annotated[
        bool | None,
        Meta(description="true: a keyword that cannot be enforced is a 400; otherwise such keywords are passed over."),
    ] = None


class JsonSchemaFormat(Struct, tag_field="type", tag="json_schema", frozen=True, forbid_unknown_fields=True):
    """JSON that a schema allows."""

    json_schema: NamedSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredOutputs(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of four ways to say what a text must be."""

    json: Annotated[JsonSchema | bool | SchemaText | None, Meta(description="A JSON schema, or its text.")] = None
    regex: Annotated[GuideText | None, Meta(description="A regular expression of the whole text.")] = None
    choice: Annotated[GuideChoices | None, Meta(description="The texts to choose from.")] = None
    grammar: Annotated[GuideText | None, Meta(description="A grammar in Lark's syntax.")] = None


class GuidedRequest(SamplingRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of requests whose text may have to follow a grammar; at most one of them, and how its JSON is written."""

    response_format: Annotated[ResponseFormat | None, Meta(description="Text, a JSON object, or a JSON schema.")] = None
    structured_outputs: Annotated[StructuredOutputs | None, Meta(description="As vLLM's parameter.")] = None
    guided_json: Annotated[JsonSchema | bool | SchemaText | None, Meta(description="structured_outputs.json.")] = None
    guided_regex: Annotated[GuideText | None, Meta(description="structured_outputs.regex.")] = None
    guided_choice: Annotated[GuideChoices | None, Meta(description="structured_outputs.choice.")] = None
    guided_grammar: Annotated[GuideText | None, Meta(description="structured_outputs.grammar.")] = None
    guided_whitespace: Annotated[
        Literal["compact", "free"] | None,
        Meta(description="White space between the tokens of JSON: none, or as the model likes; null: the server's."),
    ] = None
