"""Types that routes share: every integer has a minimum and a maximum, every list and string a maximum length.

The limits of types that src/request.rs also checks are the same there.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta

MAX_TEXT_CHARS: Final = 8_388_608
MAX_MESSAGES: Final = 8192
MAX_TOKENS: Final = 2**31 - 1

Role = Literal["system", "developer", "user", "assistant"]
Text = Annotated[str, Meta(max_length=MAX_TEXT_CHARS)]
Tag = Annotated[str, Meta(max_length=512)]
RequestedModel = Annotated[
    Tag | None,
    Meta(
        description="The name of a served model. Absent, null or empty: the first one.", examples=["internlm-chat-7b"]
    ),
]
SessionModel = Annotated[
    Tag | None,
    Meta(
        description="The name of an adapter. Any other name, or none, means the model; in a session what computed its "
        "turns.",
        examples=["internlm-chat-7b"],
    ),
]
TokenId = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
StopStrings = StopString | Annotated[list[StopString], Meta(max_length=64)]
StopTokenIds = Annotated[list[TokenId], Meta(max_length=64)]
MinTokens = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
# Keys of JSON objects are strings: nine digits, so that a pattern can say it.
TokenKey = Annotated[int, Meta(ge=0, le=999_999_999)]
LogitBias = Annotated[
    dict[TokenKey, Annotated[float, Meta(ge=-100, le=100)]],
    Meta(max_length=1024, extra_json_schema={"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"}}),
]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]

Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(ge=0, le=1)]
# Trainers ask for all tokens by a number larger than any vocabulary.
TopK = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
MinP = Annotated[float, Meta(ge=0, le=1)]
RepetitionPenalty = Annotated[float, Meta(ge=0.01, le=10)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
# Any 64-bit number; the core takes its bits.
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
ANONYMOUS: Final = -1  # the session id that stands for no session
MAX_SESSION_NUMBER: Final = 2**63 - 1
MAX_SESSION_CHARS: Final = 128
# No control characters. The code that reads the id names the offending one.
SESSION_PATTERN: Final = "^[^\\u0000-\\u001f\\u007f-\\u009f]*$"
SessionName = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_SESSION_CHARS,
        extra_json_schema={"pattern": SESSION_PATTERN},
    ),
]
# A number and its decimal digits are one session.
SessionId = Annotated[int, Meta(ge=ANONYMOUS, le=MAX_SESSION_NUMBER)] | SessionName
NamedSession = (
    Annotated[int, Meta(ge=0, le=MAX_SESSION_NUMBER)]
    | Annotated[
        str,
        Meta(
            min_length=1,
            max_length=MAX_SESSION_CHARS,
            extra_json_schema={"pattern": SESSION_PATTERN, "not": {"const": str(ANONYMOUS)}},
        ),
    ]
)
