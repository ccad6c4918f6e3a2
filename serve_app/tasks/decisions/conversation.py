"""OpenAI's ``input``: a text, or messages, calls of tools and their outputs, and how a model reads them.

The model reads a plain transcript. Each item is its speaker, a colon and its text; an empty line parts two items::

    user: I was charged twice.

    assistant: Which invoice?

    tool call find_invoice: {"number": 7}

    tool output find_invoice: paid twice

``system`` is called ``developer``, as OpenAI handles it, and a phase of the assistant follows its name in brackets. The
parts of a message are joined by line breaks; JSON is shown as JSON. One message of a user alone is its text alone: it
is the same as a text for ``input``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, WithJsonSchema

from serve_app.errors import InvalidRequestError
from serve_app.schemas import Text, shown
from serve_app.tasks.decisions.bodies import Part, wrong
from serve_app.tasks.decisions.questions import as_text

MOST_JSON_LEVELS = 32
MOST_JSON_VALUES = 10_000
MOST_JSON_BYTES = 256 * 2**10
"""OpenAI's limits of an ``input_json`` part; the bytes are those of compact UTF-8."""


def _data(value: Any) -> Any:
    objects: list[Any] = cast(list[Any], value) if isinstance(value, list) else [value]
    if not all(isinstance(each, dict) for each in objects):
        raise wrong("must be an object or a list of objects")
    values = levels = 0
    layer: list[Any] = [value]
    while layer:
        values += len(layer)
        containers = [each for each in layer if isinstance(each, dict | list)]
        levels += bool(containers)
        layer = [inside for each in containers for inside in _inside(each)]
    size = len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())
    for found, most, what in (
        (levels, MOST_JSON_LEVELS, "levels of objects and lists"),
        (values, MOST_JSON_VALUES, "values"),
        (size, MOST_JSON_BYTES, "bytes"),
    ):
        if found > most:
            raise wrong(f"has {found} {what}; it may have at most {most}")
    return value


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


class Breakpoint(Part):
    """Where OpenAI's service would end a cached prefix; accepted, and of no effect.

    Attributes:
        mode: of no effect.
    """

    mode: Literal["explicit"]


class TextPart(Part):
    """Text.

    Attributes:
        prompt_cache_breakpoint: of no effect.
    """

    type: Literal["input_text"]
    text: Text
    prompt_cache_breakpoint: Breakpoint | None = None


class JsonPart(Part):
    """An object or a list of objects, which the model sees as JSON.

    Attributes:
        data: the object or objects.
    """

    type: Literal["input_json"]
    data: Annotated[Any, AfterValidator(_data), WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "array"}]})]


class OutputText(Part):
    """Text that the assistant wrote."""

    type: Literal["output_text"]
    text: Text


class Refusal(Part):
    """Why the assistant did not answer.

    Attributes:
        refusal: what the assistant said.
    """

    type: Literal["refusal"]
    refusal: Text


def _as_parts(kind: str) -> Callable[[Any], Any]:
    """A validator that takes a text for a list of one part."""
    return lambda content: [{"type": kind, "text": content}] if isinstance(content, str) else content


AnyPart = Annotated[TextPart | JsonPart, Field(discriminator="type")]
OutputPart = Annotated[OutputText | Refusal, Field(discriminator="type")]
Content = Annotated[
    list[AnyPart],
    Field(fail_fast=True),
    BeforeValidator(_as_parts("input_text"), json_schema_input_type=str | list[AnyPart]),
]
"""What a user says, and what a question asks."""
PlainContent = Annotated[
    list[TextPart],
    Field(fail_fast=True),
    BeforeValidator(_as_parts("input_text"), json_schema_input_type=str | list[TextPart]),
]
OutputContent = Annotated[
    list[OutputPart],
    Field(fail_fast=True),
    BeforeValidator(_as_parts("output_text"), json_schema_input_type=str | list[OutputPart]),
]


class UserMessage(Part):
    """What a user says.

    Attributes:
        content: what is said.
    """

    type: Literal["message"] = "message"
    role: Literal["user"]
    content: Content


class DeveloperMessage(Part):
    """What the application says.

    Attributes:
        content: what is said.
    """

    type: Literal["message"] = "message"
    role: Literal["developer", "system"]
    content: PlainContent


class AssistantMessage(Part):
    """What a model said before.

    Attributes:
        content: what is said.
        phase: of no effect.
    """

    type: Literal["message"] = "message"
    role: Literal["assistant"]
    content: OutputContent
    phase: Literal["commentary", "final_answer"] | None = None


class _ToolItem(Part):
    """What calls of tools and their outputs share; only ``call_id`` has an effect."""

    call_id: Text
    id: Text | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class _ToolCall(_ToolItem):
    name: Text
    namespace: Text | None = None

    @property
    def full_name(self) -> str:
        return f"{self.namespace}.{self.name}" if self.namespace else self.name


class FunctionCall(_ToolCall):
    """A call of a function.

    Attributes:
        call_id: what the output refers to.
        namespace: the tool's group.
        arguments: the arguments, as JSON text.
    """

    type: Literal["function_call"]
    arguments: Text


class CustomToolCall(_ToolCall):
    """A call of a custom tool.

    Attributes:
        call_id: what the output refers to.
        namespace: the tool's group.
        input: what the tool was given.
    """

    type: Literal["custom_tool_call"]
    input: Text


class FunctionCallOutput(_ToolItem):
    """What a function answered.

    Attributes:
        call_id: the call that it answers.
        output: what the tool returned.
    """

    type: Literal["function_call_output"]
    output: PlainContent


class CustomToolCallOutput(_ToolItem):
    """What a custom tool answered.

    Attributes:
        call_id: the call that it answers.
        output: what the tool returned.
    """

    type: Literal["custom_tool_call_output"]
    output: PlainContent


_OUTPUT_OF: dict[type[FunctionCallOutput | CustomToolCallOutput], type[FunctionCall | CustomToolCall]] = {
    FunctionCallOutput: FunctionCall,
    CustomToolCallOutput: CustomToolCall,
}


def _kind(item: Any) -> str | None:
    """The role of a message, or the type of another item."""
    if isinstance(item, dict):
        fields = cast(dict[str, Any], item)
        kind = fields.get("role") if fields.get("type", "message") == "message" else fields["type"]
    else:
        kind = getattr(item, "role", getattr(item, "type", None))
    return kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[UserMessage, Tag("user")]
    | Annotated[DeveloperMessage, Tag("developer")]
    | Annotated[DeveloperMessage, Tag("system")]
    | Annotated[AssistantMessage, Tag("assistant")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[CustomToolCall, Tag("custom_tool_call")]
    | Annotated[CustomToolCallOutput, Tag("custom_tool_call_output")],
    Discriminator(_kind),
]


def _as_items(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


Input = Annotated[
    list[Item], Field(fail_fast=True), BeforeValidator(_as_items, json_schema_input_type=str | list[Item])
]


def transcript(items: Sequence[Item]) -> str:
    """The text that the model reads.

    Raises:
        InvalidRequestError: an output belongs to no call of its kind before it.
    """
    if len(items) == 1 and isinstance(items[0], UserMessage):
        return text(items[0].content)
    calls: dict[tuple[type[FunctionCall | CustomToolCall], str], str] = {}
    return "\n\n".join(_line(item, calls, index) for index, item in enumerate(items))


def _line(item: Item, calls: dict[tuple[type[FunctionCall | CustomToolCall], str], str], index: int) -> str:
    match item:
        case UserMessage():
            return f"user: {text(item.content)}"
        case DeveloperMessage():
            return f"developer: {text(item.content)}"
        case AssistantMessage():
            phase = f" ({item.phase})" if item.phase else ""
            return f"assistant{phase}: {text(item.content)}"
        case FunctionCall() | CustomToolCall():
            calls[type(item), item.call_id] = item.full_name
            return f"tool call {item.full_name}: {item.arguments if isinstance(item, FunctionCall) else item.input}"
        case FunctionCallOutput() | CustomToolCallOutput():
            name = calls.get((_OUTPUT_OF[type(item)], item.call_id))
            if name is None:
                raise InvalidRequestError(
                    f"input[{index}].call_id must be that of a call before it, not {shown(item.call_id)}",
                    param="input",
                    where=("input", index, "call_id"),
                )
            return f"tool output {name}: {text(item.output)}"


def text(parts: Sequence[TextPart | JsonPart | OutputText | Refusal]) -> str:
    """The parts of a message as one text."""
    return "\n".join(_part(part) for part in parts)


def _part(part: TextPart | JsonPart | OutputText | Refusal) -> str:
    match part:
        case TextPart() | OutputText():
            return part.text
        case JsonPart():
            return as_text(part.data)
        case Refusal():
            return part.refusal
