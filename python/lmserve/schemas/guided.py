"""Constraints on the text of an answer: OpenAI's `response_format`, and vLLM's names for the others."""

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
# A JSON schema as text. The server checks that it is one.
SchemaText = Annotated[
    GuideText,
    Meta(extra_json_schema={"contentMediaType": "application/json", "contentSchema": {"type": "object"}}),
]
# The size of the body and the cost of compiling limit what its keywords contain.
JsonSchema = Annotated[dict[str, Any], Meta(max_length=1024)]


class TextFormat(Struct, tag_field="type", tag="text", frozen=True, forbid_unknown_fields=True):
    """Any text."""


class JsonObjectFormat(
    Struct, tag_field="type", tag="json_object", frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """One JSON object."""

    schema: Annotated[JsonSchema | None, Meta(description="The schema of the object, as in llama.cpp.")] = None


class NamedSchema(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON schema and its name."""

    name: Annotated[Tag | None, Meta(description="Has no effect.")] = None
    description: Annotated[Text | None, Meta(description="Has no effect.")] = None
    schema: Annotated[JsonSchema | bool | None, Meta(description="Null: any JSON object. true: any JSON value.")] = None
    strict: Annotated[
        bool | None,
        Meta(
            description="true: a keyword that the server cannot enforce is a 400. Otherwise such keywords are ignored."
        ),
    ] = None


class JsonSchemaFormat(Struct, tag_field="type", tag="json_schema", frozen=True, forbid_unknown_fields=True):
    """JSON that follows a schema."""

    json_schema: NamedSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredOutputs(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A constraint on the text. Give one of these four."""

    json: Annotated[
        JsonSchema | bool | SchemaText | None, Meta(description="A JSON schema, as an object or as text.")
    ] = None
    regex: Annotated[GuideText | None, Meta(description="A regular expression that the whole text must match.")] = None
    choice: Annotated[GuideChoices | None, Meta(description="The text is one of these.")] = None
    grammar: Annotated[GuideText | None, Meta(description="A grammar in Lark's syntax.")] = None


class GuidedRequest(SamplingRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields that constrain the text. A request may have one constraint, and say how its JSON is written."""

    response_format: Annotated[
        ResponseFormat | None,
        Meta(description="The format of the text: any text, a JSON object, or JSON that follows a schema."),
    ] = None
    structured_outputs: Annotated[StructuredOutputs | None, Meta(description="vLLM's parameter of this name.")] = None
    guided_json: Annotated[
        JsonSchema | bool | SchemaText | None, Meta(description="The same as structured_outputs.json.")
    ] = None
    guided_regex: Annotated[GuideText | None, Meta(description="The same as structured_outputs.regex.")] = None
    guided_choice: Annotated[GuideChoices | None, Meta(description="The same as structured_outputs.choice.")] = None
    guided_grammar: Annotated[GuideText | None, Meta(description="The same as structured_outputs.grammar.")] = None
    guided_whitespace: Annotated[
        Literal["compact", "free"] | None,
        Meta(description="White space in JSON. compact: none. free: the model decides. Null: the server's default."),
    ] = None
