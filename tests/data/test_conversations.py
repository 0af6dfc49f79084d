"""Conversations in files: columns of messages, written as lists or as text."""

import copy
import csv
import json

import pytest

from msp_plugin.data.sources import load_texts
from msp_plugin.errors import DataError
from tests.helpers.rows import read, write_rows

USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("row, columns", [
    ({"messages": [USER, REPLY]}, ("messages",)),
    ({"messages": [{**USER, "tool_calls": None}, {**REPLY, "tool_calls": None}]}, ("messages",)),
    ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, ("conversations",)),
    ({"prompt": [USER], "completion": [REPLY]}, ("prompt", "completion")),
    ({"messages": {"role": ["user", "assistant"], "content": ["hi", "hello"]}}, ("messages",)),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]},
                   {"role": "assistant", "content": [{"type": "text", "text": "hello"}]}]}, ("messages",)),
])  # fmt: skip
def test_conversations_are_messages_with_role_and_content(tmp_path, name, row, columns):
    documents = load_texts(write_rows(tmp_path / name, [{**row, "id": 1}]))
    (chat,) = documents
    assert list(chat.messages) == [USER, REPLY] and documents.columns == columns


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
@pytest.mark.parametrize("write", [json.dumps, repr, lambda rows: json.dumps(rows, indent=2)])
def test_a_conversation_that_is_written_as_a_text_is_one(tmp_path, name, write):
    rows = [{"messages": write([USER, REPLY]), "talk": write([USER])}, {"messages": "null", "talk": "a"}]
    path = tmp_path / name
    if name == "a.csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        write_rows(path, rows)
    for column in ("text", "messages"):
        documents = load_texts(str(path), column)
        assert [list(chat.messages) for chat in documents] == [[USER, REPLY]] and documents.skipped == 1
    assert read(str(path), "talk") == [[USER], "a"]


@pytest.mark.parametrize(
    "value", ["just text", "[1, 2]", "[{'role': 'user'}]", "[{'role': 'user' 'content'", "{", "[" * 500]
)
def test_a_text_in_a_column_of_conversations_is_named_with_its_row(tmp_path, value):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [USER]}, {"messages": value}])
    with pytest.raises(
        DataError, match="a.jsonl, line 2: 'messages' is .*expected a list of messages"
    ) as error:
        read(path)
    assert "written as JSON" in error.value.hint


def test_a_text_column_stays_text_whatever_it_looks_like(tmp_path):
    text = json.dumps([USER])
    assert read(write_rows(tmp_path / "a.jsonl", [{"text": text}])) == [text]


def test_an_asked_column_of_messages_goes_before_a_text(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "one", "talk": [USER, REPLY]}])
    assert read(path, "talk") == [[USER, REPLY]] and read(path) == ["one"]


def test_a_prompt_and_completion_of_text_are_joined(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "one ", "completion": "two"}])
    assert read(path) == ["one two"] and read(path, "prompt") == ["one "]


def test_usual_columns_are_not_looked_for_when_another_one_is_asked_for(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [USER, REPLY]}])
    with pytest.raises(DataError, match="has no text in 'message'") as error:
        read(path, "message")
    assert "did you mean 'messages'?" in error.value.hint


def test_empty_conversations_are_skipped(tmp_path):
    rows = [{"messages": m} for m in ([], None, [{"role": "user", "content": ""}], [USER])]
    documents = load_texts(write_rows(tmp_path / "a.jsonl", rows))
    assert len(list(documents)) == 1 and documents.skipped == 3


def test_a_picture_in_a_message_is_refused(tmp_path):
    rows = [{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}]
    with pytest.raises(DataError, match="neither text nor messages"):
        read(write_rows(tmp_path / "a.jsonl", rows))


def test_keys_that_a_row_lacks_are_no_nulls_within_a_message(tmp_path):
    call = {"function": {"name": "f", "arguments": {"day": None, "city": "Ulm"}}}
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [USER, {**REPLY, "tool_calls": [call]}]}])
    ((_, answer),) = read(path)
    assert answer["tool_calls"][0]["function"]["arguments"] == {"city": "Ulm"}


@pytest.mark.parametrize("write", [list, json.dumps], ids=["list", "text"])
def test_the_functions_that_an_assistant_may_call_reach_the_template(tmp_path, tokenizer, write):
    made = copy.deepcopy(tokenizer)
    made.chat_template = "{% for t in tools %}{{ t['name'] }} {% endfor %}{{ messages[0]['content'] }}"
    tools = [{"name": "weather", "unit": None}, {"name": "time", "unit": "s"}]
    rows = [{"messages": [USER], "tools": write(tools)}, {"messages": [USER], "tools": None}]
    first, second = load_texts(write_rows(tmp_path / "a.jsonl", rows))
    assert first.text(made) == "weather time hi" and first.tools == ({"name": "weather"}, tools[1])
    assert second.tools == ()
