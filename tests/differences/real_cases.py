"""Prompts that a cache missed, as public bug reports describe them; texts and names are our own.

Each case names the repository and the number of its issue or pull request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tokcache.differences import DifferenceClass as C

if TYPE_CHECKING:
    from collections.abc import Sequence


class Case(NamedTuple):
    """Two requests, the class of their difference, and the field that holds it."""

    source: str
    before: dict[str, Any]
    after: dict[str, Any]
    expected: C
    field: str


RULES = (
    "You look after the timetable of a small railway.\n"
    "Answer in full sentences, and name the platform.\n"
    "If a train is late, say by how much, and offer the next one.\n"
)
ASK = "When does the first train to the coast leave?"
REPLY = "The first train to the coast leaves at a quarter past six from platform two."
NEXT = "And does it stop at the lighthouse?"


def text(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(system: str, *turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [text("system", system), *turns], **more}


def grown(head: str, **more: Any) -> dict[str, Any]:
    """Return the second turn of a chat whose system text begins with `head`."""
    turns = (text("user", ASK), text("assistant", REPLY), text("user", NEXT))
    return chat(head + RULES, *turns, **more)


def first(head: str, **more: Any) -> dict[str, Any]:
    return chat(head + RULES, text("user", ASK), **more)


def tool(name: str, **properties: str) -> dict[str, Any]:
    """Return a tool with texts as parameters."""
    schema = {key: {"type": "string", "description": each} for key, each in properties.items()}
    parameters = {"type": "object", "properties": schema, "required": list(schema)}
    function = {"name": name, "description": f"Use it to {name}.", "parameters": parameters}
    return {"type": "function", "function": function}


FIND, BOOK, WARN = (
    tool("find", origin="a station", goal="another one"),
    tool("book", train="its number"),
    tool("warn", reason="why"),
)
_SCHEMA = FIND["function"]["parameters"]
SWAPPED = {"type": "function", "function": {
    **FIND["function"],
    "parameters": {"required": _SCHEMA["required"], "properties": _SCHEMA["properties"],
                   "type": "object"},
}}  # fmt: skip


def call(arguments: str, ids: str = "call_1") -> dict[str, Any]:
    function = {"name": "find", "arguments": arguments}
    return text(
        "assistant", None, tool_calls=[{"id": ids, "type": "function", "function": function}]
    )


def answered(*turns: dict[str, Any], later: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return a chat with `turns` between two questions."""
    return chat(RULES, text("user", ASK), *turns, text("user", NEXT), *later)


def blocks(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": each} for each in texts]


def billing(version: str, nonce: str, *turns: dict[str, Any]) -> dict[str, Any]:
    """Return a request of Anthropic's API whose first system text is a billing line."""
    line = f"x-anthropic-billing-header: cc_version={version}; cc_entrypoint=cli; cch={nonce};"
    system = blocks(line, RULES)
    return {
        "model": "m",
        "max_tokens": 9,
        "system": system,
        "messages": [text("user", ASK), *turns],
    }


PNG = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0K"}}
JPEG = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9j/4AAQSk"}}
RESULT = text("tool", "06:15 platform 2, 07:40 platform 1", tool_call_id="call_1")
LONG = "\n".join(f"{hour:02}:15 to the coast, platform {hour % 4}" for hour in range(5, 23))
OLD = [text(role, f"{role} says something about train {n}, which is no. {n * 7} of the day")
       for n in range(6) for role in ("user", "assistant")]  # fmt: skip
LATER = [text("assistant", REPLY), text("user", NEXT)]


def responses(*items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "m", "instructions": RULES, "input": [text("user", ASK), *items], **more}


def called(ids: str) -> list[dict[str, Any]]:
    """Return a function call of the Responses API and its result."""
    return [
        {"type": "function_call", "call_id": ids, "name": "find", "arguments": '{"goal": "coast"}'},
        {"type": "function_call_output", "call_id": ids, "output": "06:15 platform 2"},
        text("user", NEXT),
    ]


CASES = [
    # A clock with seconds at the head of the system text.
    Case("earendil-works/pi#1873",
         first("Current date and time: Friday, March 6, 2026 at 10:31:05 AM GMT+1\n"),
         grown("Current date and time: Friday, March 6, 2026 at 10:31:52 AM GMT+1\n"),
         C.DATE, "messages[0].content"),
    # The same with an ISO date and a zone.
    Case("earendil-works/pi#2013", first("Now: 2026-03-06T10:31:05+01:00\n"),
         grown("Now: 2026-03-06T10:32:41+01:00\n"), C.DATE, "messages[0].content"),
    # A date without a clock: the miss comes once a day.
    Case("zylon-ai/private-gpt#2271", first("Today is 5 March 2026.\n"),
         grown("Today is 6 March 2026.\n"), C.DATE, "messages[0].content"),
    # A placeholder for date and time that changes every minute.
    Case("Mintplex-Labs/anything-llm#6398",
         first("The current date and time is Thursday, September 17, 2026 9:59 AM.\n"),
         grown("The current date and time is Thursday, September 17, 2026 10:00 AM.\n"),
         C.DATE, "messages[0].content"),
    # The start of the conversation to the minute, built again by another process.
    Case("NousResearch/hermes-agent#15866",
         first("Conversation started: Sunday, April 26, 2026 03:42 PM\n"),
         grown("Conversation started: Sunday, April 26, 2026 04:07 PM\n"),
         C.DATE, "messages[0].content"),
    # Milliseconds in the metadata of a memory block.
    Case("joshuadavidthomas/opencode-agent-memory#29",
         first("<memory rendered='2026-09-02T14:58:23.413Z' blocks='3'>likes trains</memory>\n"),
         grown("<memory rendered='2026-09-02T14:58:23.869Z' blocks='3'>likes trains</memory>\n"),
         C.DATE, "messages[0].content"),
    # UTC with seconds among facts about the running program.
    Case("adolfousier/opencrabs#657", first("Runtime\nTimestamp: 2026-07-20 11:02:03 UTC\n"),
         grown("Runtime\nTimestamp: 2026-07-20 11:02:59 UTC\n"), C.DATE, "messages[0].content"),
    # A nonce in a billing line in front of the system text.
    Case("ggml-org/llama.cpp#20623", billing("2.1.100.7b4", "eb6c6"),
         billing("2.1.100.7b4", "0aaa9", *LATER), C.RANDOM, "system[0].text"),
    # The same line: the end of the version is computed from the request, too.
    Case("EasyMetaAu/helm-api#208", billing("2.1.175.01c", "36ee5"),
         billing("2.1.175.9f0", "71fea", *LATER), C.RANDOM, "system[0].text"),
    # The folder of a session has a UUID in its name.
    Case("anthropics/claude-code#92524",
         first("Put files into pad/fc9aab5b-da05-4cc7-bbe2-410a1c472151/scratch only.\n"),
         grown("Put files into pad/88966ec9-2cb4-4872-bc6b-624b66257462/scratch only.\n"),
         C.RANDOM, "messages[0].content"),
    # The id of a conversation, made of letters alone.
    Case("dust-tt/dust#20969", first("conversation_id: upvxrtNBKm\nworkspace: rail\n"),
         grown("conversation_id: Qs7dKwyTeB\nworkspace: rail\n"), C.RANDOM, "messages[0].content"),
    # A request's id and a time: the id comes first.
    Case("abstxn/lunch-uncle#6",
         first("Request 0f7e0d0c-5a64-4b3a-9d3c-2f6a3b1f0e11 at 2026-08-27T08:00:00.000Z. "),
         grown("Request 6c1f2d9a-1b77-4f0e-8a55-90d1c7be4a02 at 2026-08-27T08:00:09.120Z. "),
         C.RANDOM, "messages[0].content"),
    # Ids of tool calls that are made up again whenever a session is loaded.
    Case("NousResearch/hermes-agent#3991", responses(*called("call_9f86d081884c")[:2]),
         responses(*called("call_2c26b46b68ff")), C.RANDOM, "input[1].id"),
    # The rounds of a loop are counted in a reminder in front of the history.
    Case("mangowhoiscloud/geode#2026",
         chat(RULES, text("user", "<system-reminder>Current round: 3</system-reminder>"), *OLD),
         chat(RULES, text("user", "<system-reminder>Current round: 4</system-reminder>"), *OLD,
              *LATER), C.COUNTER, "messages[1].content"),
    # The tokens used so far in the system text.
    Case("bubbuild/bub#76", first("<budget>tokens used: 18,204</budget>\n"),
         grown("<budget>tokens used: 19,733</budget>\n"), C.COUNTER, "messages[0].content"),
    # The state of a loop: iteration and best value.
    Case("DraconDev/pi-goal-list-loop-audit#44",
         chat(RULES, text("user", "loop: iteration=7 best=0.83 stall=0\ntarget: fewer delays"),
              *OLD),
         chat(RULES, text("user", "loop: iteration=8 best=0.85 stall=1\ntarget: fewer delays"),
              *OLD, *LATER), C.COUNTER, "messages[1].content"),
    # Tools in the order in which their servers answered.
    Case("openclaw/openclaw#58037", first("", tools=[WARN, FIND, BOOK]),
         grown("", tools=[BOOK, FIND, WARN]), C.REORDERED, "tools[0]"),
    # Tools out of a hash map, in the Responses API.
    Case("openai/codex#2611", responses(tools=[FIND["function"], BOOK["function"]]),
         responses(*LATER, tools=[BOOK["function"], FIND["function"]]), C.REORDERED, "tools[0]"),
    # The arguments of an earlier call are written with their keys in another order.
    Case("OpenRouterTeam/ai-sdk-provider#472",
         answered(call('{"origin": "city", "goal": "coast"}'), RESULT),
         answered(call('{"goal": "coast", "origin": "city"}'), RESULT, later=LATER),
         C.REORDERED, "messages[2].tool_calls[0].arguments"),
    # Two clients write the same schema with its keys in another order.
    Case("sgl-project/sglang#34553", first("", tools=[BOOK, FIND]),
         first("", tools=[BOOK, SWAPPED]), C.REORDERED, "tools[1]"),
    # The end of a reply is trimmed before it is sent back.
    Case("SillyTavern/SillyTavern#4611",
         chat(RULES, text("user", ASK), text("assistant", REPLY + " \n\n"), text("user", NEXT)),
         chat(RULES, text("user", ASK), text("assistant", REPLY), text("user", NEXT), *LATER),
         C.WHITE_SPACE, "messages[2].content"),
    # Reminders are put into the last message, and are gone when it has become history.
    Case("anthropics/claude-agent-sdk-typescript#269",
         {"model": "m", "system": RULES, "messages": [text("user", blocks(
             "<system-reminder>The list of tasks is empty.</system-reminder>", ASK))]},
         {"model": "m", "system": RULES, "messages": [text("user", blocks(ASK)), *LATER]},
         C.EDITED, "messages[0].content[0].text"),
    # Old results of tools are replaced by a short note.
    Case("anomalyco/opencode#32515",
         answered(call("{}"), text("tool", LONG, tool_call_id="call_1")),
         answered(call("{}"), text("tool", "[removed]", tool_call_id="call_1"), later=LATER),
         C.EDITED, "messages[3].content"),
    # A system message in the middle is moved to the front of the prompt.
    Case("raullenchai/Rapid-MLX#1512", chat(RULES, *OLD),
         chat(RULES + "\nThe date has changed; do not mention it.", *OLD, *LATER),
         C.EDITED, "messages[0].content"),
    # A file of memories in the system text is written again after each turn.
    Case("open-webui/computer#164",
         first("# Memory\n- prefers the window\n- travels on Fridays\n\n# Rules\n"),
         grown("# Memory\n- prefers the aisle since June\n- travels on Fridays\n\n# Rules\n"),
         C.EDITED, "messages[0].content"),
    # The system text is put on top once more in each turn.
    Case("lastmile-ai/mcp-agent#89", first(""),
         {"model": "m", "messages": [text("system", RULES), *grown("")["messages"]]},
         C.INSERTED, "messages[1]"),
    # The oldest messages are dropped one by one once the context is full.
    Case("SillyTavern/SillyTavern#1278", chat(RULES, *OLD), chat(RULES, *OLD[2:], *LATER),
         C.DROPPED, "messages[1]"),
    # The thinking of earlier replies is taken out when they are sent back.
    Case("anomalyco/opencode#19081",
         answered(text("assistant", REPLY, reasoning_content="The timetable says 06:15.")),
         answered(text("assistant", REPLY), later=LATER),
         C.THINKING, "messages[2].reasoning_content"),
    # The same inside a text: thinking that the client removes from it.
    Case("nibor1896/Crow#60",
         {"prompt": f"user: {ASK}\nassistant: <think>\nLook it up.\n</think>\n\n{REPLY}\nuser: "},
         {"prompt": f"user: {ASK}\nassistant: {REPLY}\nuser: {NEXT}"}, C.THINKING, "prompt"),
    # A pasted image becomes the name of a file.
    Case("anthropics/claude-code#91705",
         {"model": "m", "system": RULES, "messages": [text("user", [PNG, *blocks(ASK)])]},
         {"model": "m", "system": RULES,
          "messages": [text("user", blocks("[Image: ~/.cache/1.png]", ASK)), *LATER]},
         C.IMAGE, "messages[0].content[0]"),
    # Only the newest three images are kept.
    Case("NousResearch/hermes-agent#113517",
         chat(RULES, text("user", [*blocks("The board:"), JPEG]), *LATER),
         chat(RULES, text("user", blocks("The board:")), *LATER, *LATER),
         C.IMAGE, "messages[1].content[1]"),
    # Servers that connect late: their tools are missing in the first request.
    Case("anthropics/claude-code#90584", first("", tools=[FIND]),
         grown("", tools=[FIND, BOOK, WARN]), C.TOOLS, "tools[1]"),
    # A mid-conversation instruction is sent with another role than before.
    Case("Oaklight/llm-rosetta#498",
         chat(RULES, text("user", ASK), text("developer", "Use plain words."), *LATER),
         chat(RULES, text("user", ASK), text("system", "Use plain words."), *LATER, *LATER),
         C.ROLE, "messages[2].role"),
    # A change of the effort changes the head of the prompt.
    Case("openai/codex#35416", responses(reasoning={"effort": "low"}),
         responses(*LATER, reasoning={"effort": "high"}), C.SETTINGS, "reasoning"),
]  # fmt: skip
