"""Three turns of an agent of openai-agents: `python openai_agents_turns.py URL MODEL ROUTE FILE TASK...`.

ROUTE: responses or chat. It prints what the agent says at the end of each turn.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from agents import (
    Agent,
    Model,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI


@function_tool
def read_file(path: str) -> str:
    """Read a text file."""
    return Path(path).read_text("utf-8")


@function_tool
def edit_file(path: str, old: str, new: str) -> str:
    """Write one text in the place of another."""
    text = Path(path).read_text("utf-8")
    Path(path).write_text(text.replace(old, new), "utf-8")
    return f"wrote {len(text)} characters"


async def main(url: str, name: str, route: str, tasks: list[str]) -> None:
    set_tracing_disabled(disabled=True)
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none")
    kind: type[Model] = {"responses": OpenAIResponsesModel, "chat": OpenAIChatCompletionsModel}[route]
    model = kind(name, client)  # type: ignore[call-arg]
    agent = Agent(name="Editor", instructions="You edit files.", model=model, tools=[read_file, edit_file])
    session = SQLiteSession("three turns")
    for number, task in enumerate(tasks):
        if number % 2:
            streamed = Runner.run_streamed(agent, task, session=session)
            async for _ in streamed.stream_events():
                pass
            said = streamed.final_output
        else:
            said = (await Runner.run(agent, task, session=session)).final_output
        sys.stdout.write(f"{said}\n")


asyncio.run(main(*sys.argv[1:4], sys.argv[4:]))
