"""Conversations in the two common shapes to examples of several turns; nothing is guessed.

OpenAI: `messages: [{role: system|user|assistant, content}]`. ShareGPT: `conversations:
[{from: system|human|gpt, value}]`. What does not fit comes back as the reason to drop the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hrmtext.data.example import DEFAULT_CONDITION, Example, Turn
from hrmtext.errors import DataError

CHAT_KEYS = ("messages", "conversations")
"""A row with one of these and no `instruction` is a conversation."""

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
ROLES = {
    "system": SYSTEM, "developer": SYSTEM,
    "user": USER, "human": USER,
    "assistant": ASSISTANT, "gpt": ASSISTANT,
    "tool": TOOL, "function": TOOL, "function_call": TOOL, "observation": TOOL,
}  # fmt: skip
TOOL_FIELDS = ("tool_calls", "function_call", "tool_call_id")
TOOLS_DROPPED = "tool or function message"


def read_conversation(row: dict[str, Any]) -> Example | str:
    """The row as an example, or why it cannot be one.

    System text is put in front of the first user text, with a blank line between. An answer bears
    no loss where its message says `"weight": 0` or `"train": false`; turns behind the last answer
    that does are left away, as no token that is learnt sees them.
    """
    keys = [key for key in CHAT_KEYS if row.get(key) is not None]
    if len(keys) > 1:
        return "both messages and conversations"
    if not keys:
        return "no messages"
    messages = row[keys[0]]
    if not isinstance(messages, list):
        return f"{keys[0]} is not a list"
    if not messages:
        return "no messages"
    if row.get("tools") or row.get("functions"):
        return TOOLS_DROPPED
    condition = row.get("condition")
    if condition is None:
        condition = DEFAULT_CONDITION
    if not isinstance(condition, str):
        return "condition is not a string"
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        return "system is not a string"
    parts = _read_messages(messages, system)
    if isinstance(parts, str):
        return parts
    if parts and parts[-1][0] == USER:
        return "conversation ends without an answer"
    turns = _pair(parts)
    if isinstance(turns, str):
        return turns
    while turns and not turns[-1].train:
        turns.pop()
    if not turns:
        return "no answer bears loss"
    *history, last = turns
    return Example(condition, last.instruction, last.response, tuple(history))


def read_question(messages: Any) -> tuple[tuple[Turn, ...], str]:
    """Earlier turns and the question of a conversation that waits for its next answer.

    Raises:
        DataError: what would make a training row a dropped one, or no question at the end.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(
            "no messages; expected a list such as [{'role': 'user', 'content': 'Hello'}]"
        )
    parts = _read_messages(messages, None)
    if not isinstance(parts, str) and parts and parts[-1][0] != USER:
        parts = "the last message is not the user's, so there is nothing to answer"
    turns = parts if isinstance(parts, str) else _pair(parts[:-1])
    if isinstance(turns, str):
        raise DataError(f"cannot answer these messages: {turns}")
    return tuple(turns), parts[-1][1]


def with_system(system: str | None, instruction: str) -> str:
    """The first user text of a conversation with its system text in front, where there is one."""
    return f"{system}\n\n{instruction}" if system and not system.isspace() else instruction


def read_history(value: Any) -> tuple[Turn, ...] | str:
    """The `history` of a cleaned row (a list of turns), or what is wrong with it."""
    if not isinstance(value, list):
        return "history is not a list"
    turns = []
    for item in value:
        if not isinstance(item, dict) or set(item) - set(Turn._fields):
            return "history holds something other than instruction, response, train"
        instruction, response = item.get("instruction"), item.get("response")
        train = item.get("train", True)
        if not isinstance(instruction, str) or not isinstance(response, str):
            return "history holds a turn without instruction or response"
        if not isinstance(train, bool):
            return "history: train is neither true nor false"
        turns.append(Turn(instruction, response, train))
    return tuple(turns)


def _read_messages(
    messages: Sequence[Any], system: str | None
) -> list[tuple[str, str, bool]] | str:
    """(role, text, bears loss) of the user's and the assistant's messages, system text in front."""
    parts: list[tuple[str, str, bool]] = []
    for message in messages:
        part = _read_message(message)
        if isinstance(part, str):
            return part
        parts.append(part)
    if parts[0][0] == SYSTEM:
        if system:
            return "system text twice"
        system = parts.pop(0)[1]
    if not parts:
        return "no user message"
    role, text, train = parts[0]
    parts[0] = (role, with_system(system, text), train)
    return parts


def _read_message(message: Any) -> tuple[str, str, bool] | str:
    """(role, text, bears loss) of one message, or what is wrong with it."""
    if not isinstance(message, dict):
        return "a message is not an object"
    names = [
        (speaker, text)
        for speaker, text in (("role", "content"), ("from", "value"))
        if message.get(speaker) is not None
    ]
    if len(names) != 1:
        return "unknown message shape (expected role and content, or from and value)"
    speaker, text_key = names[0]
    role = ROLES.get(message[speaker]) if isinstance(message[speaker], str) else None
    if role is None:
        return "unknown role"
    if role == TOOL or any(message.get(field) for field in TOOL_FIELDS):
        return TOOLS_DROPPED
    text = _text(message.get(text_key))
    if text is None:
        return "message without text"
    if not isinstance(text, str):
        return "image or other content that is not text"
    if role in (USER, SYSTEM):
        if message.get("weight") is not None or message.get("train") is not None:
            return "weight or train on a message that is no answer"
        if role == USER and (not text or text.isspace()):
            return "empty user message"
        return role, text, True
    if not text or text.isspace():
        return "empty assistant message"
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        return "weight is neither 0 nor 1"
    if train is not None and not isinstance(train, bool):
        return "train is neither true nor false"
    return role, text, weight != 0 and train is not False


def _text(content: Any) -> Any:
    """The text of a message; None where there is none, False where it is something else."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            return False
        if not isinstance(part.get("text"), str):
            return None
        texts.append(part["text"])
    return "".join(texts)


def _pair(parts: Sequence[tuple[str, str, bool]]) -> list[Turn] | str:
    """Turns of messages that end with an answer, or with nothing."""
    turns = []
    for number, (role, text, train) in enumerate(parts):
        if role == SYSTEM:
            return "system message behind the first message"
        if role != (USER, ASSISTANT)[number % 2]:
            if number == 0:
                return "conversation starts with an answer"
            return f"two {role} messages in a row"
        if role == ASSISTANT:
            turns.append(Turn(parts[number - 1][1], text, train))
    if len(parts) % 2:
        return "two user messages in a row"
    return turns
