"""Chat templates: the same text as transformers, where they are read from, and what a request cannot do with them."""

import json
import threading
import time

import pytest
from fake_engine import write_tokenizer

from infer.serve import chat
from infer.serve.chat import ChatTemplate
from infer.serve.text import Tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather <now> in a place, é & more",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}, "days": {"type": "integer", "default": 1}},
                "required": ["place"],
            },
        },
    },
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}},
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": {"place": "Köln"}}}
CONVERSATIONS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "<b>1 & 2</b> 你好 😀"}],
    [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nI look.", "tool_calls": [CALL]},
        {"role": "tool", "content": "12 °C", "tool_call_id": "call_1"},
        {"role": "tool", "content": "{}", "tool_call_id": "call_2"},
        {"role": "assistant", "content": "Cold."},
        {"role": "user", "content": "thanks"},
    ],
]
DOCUMENTS = [{"title": "One", "text": "first"}, {"title": "Two", "text": "second"}]

CHATML_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content | trim + '\\n\\n' }}{% endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- if message.role == 'user' and ns.last_user < 0 %}{% set ns.last_user = index %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content or '' %}
        {%- if '</think>' in content and loop.index0 < ns.last_user %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{ content }}
        {%- for call in message.tool_calls or [] %}
            {%- set f = call.function if call.function is defined else call %}
            {{- '\\n<tool_call>\\n{"name": "' ~ f.name ~ '", "arguments": ' }}
            {{- f.arguments if f.arguments is string else f.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}{% endgeneration %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
HEADERS = """\
{{ bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "[system]\\nToday: " + date_string + "\\n" + system_message }}
{%- if tools is not none %}
    {%- for t in tools %}{{ t | tojson(indent=4) }}{{ "\\n\\n" }}{% endfor %}
{%- endif %}
{%- for d in documents or [] %}[{{ loop.index }}/{{ d.title | upper }}]{{ d['text'] }}{% endfor %}
{%- for message in messages %}
    {%- if not (message.role in ('ipython', 'tool') or 'tool_calls' in message) %}
        {{- '[' + message['role'] + ']\\n' + message['content'] | trim + eos_token }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("one call at a time") }}{% endif %}
        {{- message.tool_calls[0].function.arguments.items() | list | first | join('=') }}
    {%- elif message.content is mapping or message.content is iterable %}
        {{- message.content | tojson }}
    {%- endif %}
    {%- if loop.index > 4 %}{% break %}{% endif %}
{% endfor %}
{%- if add_generation_prompt %}{{- '[assistant]\\n' }}{% endif %}
"""
INST = """\
{%- macro show(text) -%}[{{ text | replace('&', 'and') }}]{%- endmacro %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}{{ users | length }}{{ (users | last).content[:5] }}
{% for message in messages if message.role != 'system' %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
    {{ show(message['content']) }} {{ loop.cycle('odd', 'even') }} {{ 'x' * 3 }} {{ 2 ** 3 }}
    {# a comment #}
{% endfor %}
{{ messages | map(attribute='role') | unique | join(',') }}{{ dict(a=1) }}
"""


@pytest.mark.parametrize("template", [CHATML_TOOLS, HEADERS, INST], ids=["chatml", "headers", "inst"])
def test_the_text_is_transformers(tmp_path, template):
    transformers = pytest.importorskip("transformers")
    path = write_tokenizer(tmp_path, chat_template=template)
    ours, theirs = Tokenizer.load(path), transformers.PreTrainedTokenizerFast.from_pretrained(path)
    variants = [{}, {"tools": TOOLS}, {"tools": []}, {"documents": DOCUMENTS}, {"enable_thinking": False}]
    texts = set()
    for conversation in CONVERSATIONS:
        for variant in variants:
            for add_generation_prompt in (True, False):
                options = {**variant, "add_generation_prompt": add_generation_prompt}
                wanted = theirs.apply_chat_template(conversation, tokenize=False, **options)
                assert ours.apply_chat_template(conversation, **options) == wanted
                texts.add(wanted)
    assert len(texts) >= 3


def test_a_template_for_tools(tmp_path):
    transformers = pytest.importorskip("transformers")
    named = [{"name": name, "template": name + "{{ tools | tojson }}"} for name in ("default", "tool_use", "rag")]
    path = write_tokenizer(tmp_path, chat_template=named)
    ours, theirs = Tokenizer.load(path), transformers.PreTrainedTokenizerFast.from_pretrained(path)
    for tools in (None, [], TOOLS):
        wanted = theirs.apply_chat_template(CONVERSATIONS[0], tools=tools, tokenize=False)
        assert ours.apply_chat_template(CONVERSATIONS[0], tools=tools) == wanted
        assert wanted.startswith("default" if tools is None else "tool_use")


def test_where_the_template_stands(tmp_path):
    """Each source goes before the ones that follow it here."""
    user = CONVERSATIONS[0]

    def text(chosen=None, tools=None):
        return Tokenizer.load(path, chosen).apply_chat_template(user, tools=tools)

    path = write_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(ValueError, match="no chat template"):
        text()
    (path / "processor_config.json").write_text(json.dumps({"chat_template": "processor"}))
    assert text() == "processor"
    (path / "chat_template.json").write_text(json.dumps({"chat_template": "older processor"}))
    assert text() == "older processor"
    write_tokenizer(path, chat_template="config")
    assert text() == "config"
    (path / "chat_template.jinja").write_text("file")
    assert text() == text(tools=TOOLS) == "file"
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert (text(), text(tools=TOOLS)) == ("file", "tools")
    (tmp_path / "own.jinja").write_text("own {{ eos_token }}")
    assert text(str(tmp_path / "own.jinja")) == text(str(tmp_path / "own.jinja"), TOOLS) == "own <|im_end|>"
    assert text("{{ messages[0].content }}!") == "hi!"


@pytest.mark.parametrize(
    ("files", "chosen", "message"),
    [
        ({}, "/nowhere/template.jinja", "--chat-template '/nowhere/template.jinja' is no file"),
        ({}, "{% if %}", "--chat-template: the chat template is not valid Jinja"),
        ({"chat_template.jinja": b"\xff"}, None, "chat_template.jinja cannot be read"),
        ({"additional_chat_templates/rag.jinja": b"x"}, None, 'no template named "default", only rag'),
        ({"tokenizer_config.json": b'{"chat_template": 3}'}, None, "must be a string or a list, not int"),
        ({"tokenizer_config.json": b'{"chat_template": ["x"]}'}, None, "must have a name and a template"),
        ({"tokenizer_config.json": b"{}", "chat_template.json": b"[]"}, None, "chat_template.json must hold a JSON"),
    ],
)
def test_sources_that_are_wrong_are_named(tmp_path, files, chosen, message):
    path = write_tokenizer(tmp_path)
    for name, data in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(path, chosen)


def test_special_tokens_of_older_directories(tmp_path):
    path = write_tokenizer(tmp_path, chat_template="{{ bos_token }}|{{ eos_token }}|{{ pad_token }}")
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<end>"}, "pad_token": "<pad>"}))
    assert Tokenizer.load(path).apply_chat_template([]) == "<|im_start|>|<end>|<pad>"
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": {}}))
    assert Tokenizer.load(path).apply_chat_template([]) == "<|im_start|>|<|im_end|>|"


def test_text_as_parts_where_the_template_shows_only_parts():
    parts = "{% for m in messages %}{% for p in m.content %}{{ p.text }};{% endfor %}{% endfor %}"
    both = "{% for m in messages %}{% if m.content is string %}S{{ m.content }}{% else %}P{% endif %}{% endfor %}"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes "}]
    assert ChatTemplate(parts, "t", {}).render(messages) == "hi;yes ;"
    assert ChatTemplate(parts, "t", {}).render(messages, False, continue_final_message=True) == "hi;yes "
    assert ChatTemplate(both, "t", {}).render(messages) == "ShiSyes "
    assert ChatTemplate("constant", "t", {}).render(messages) == "constant"


@pytest.mark.parametrize("continued", [False, True])
def test_developers_where_the_template_knows_none(continued):
    said = [("user", "u"), ("system", "s"), ("developer", "d"), ("assistant", "a"), ("developer", "e")]
    messages = [{"role": role, "content": content} for role, content in said]
    source = "{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"
    text = ChatTemplate(source, "x", {}).render(messages, False, continue_final_message=continued)
    merged = ["system:s\n\nd\n\ne|user:u|assistant:a|", "system:s\n\nd|user:u|assistant:a|system:e"]
    assert text == merged[continued]
    # A template that names the role gets it, and without one nothing moves.
    knowing = ChatTemplate(source + "{% if 0 == 'developer' %}{% endif %}", "x", {})
    assert "|developer:d|assistant:a|developer:e" in knowing.render(messages, False, continue_final_message=continued)
    assert ChatTemplate(source, "x", {}).render(messages[:2], False) == "user:u|system:s|"


def test_variables():
    source = "{{ bos_token }}{{ enable_thinking }}{{ messages }}{{ range(x) }}"
    template = ChatTemplate(source, "t", {"bos_token": "<s>"})
    assert template.variables == {"enable_thinking", "x"}
    for name in ("chat_template", "tokenize", "bos_token", "range", "raise_exception"):
        with pytest.raises(ValueError, match=f"must not set {name}"):
            template.render([], **{name: 1})


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("template", "variables", "message"),
    [
        ("{{ ' ' * n }}", {"n": 10**12}, "repeats a text"),
        ("{{ n * [1, 2] }}", {"n": 10**12}, "repeats a text"),
        ("{{ 9 ** n }}", {"n": 10**12}, "too high a power"),
        ("{{ 9 ** n ** n }}", {"n": 1000}, "too high a power"),
        ("{{ 'x'.ljust(n) }}", {"n": 10**9}, "characters wide"),
        ("{{ 'x' | center(n) }}{{ 'y' | center(5) }}", {"n": 10**9}, "characters wide"),
        ("{{ text | indent(n, first=true) }}", {"n": 10**6, "text": "\n" * 1000}, "characters wide"),
        ("{{ [1] | tojson(indent=n) }}", {"n": 10**9}, "indents by"),
        ("{% for i in range(n) %}{% endfor %}", {"n": 10**9}, "refuses these messages: Range too big"),
        ("{{ 1 // n }}", {"n": 0}, "refuses these messages"),
        ("{{ n | tojson }}", {"n": nested(10**5)}, "refuses these messages"),
        ("{% for a in n %}{% for b in n %}{{ text }}{% endfor %}{% endfor %}",
         {"n": [0] * 1000, "text": "x" * 1000}, "makes more than"),
    ],
)  # fmt: skip
def test_hostile_variables(template, variables, message):
    """Refused before they take time or memory."""
    compiled, began = ChatTemplate(template, "t", {}), time.monotonic()
    with pytest.raises(ValueError, match=message):
        compiled.render([{"content": ""}], **variables)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "body",
    [
        "{{ a }}",  # writes
        "{% set s.x = s.x + a.real %}",  # looks up
        "{% set s = [a] | map(attribute='b') | list %}",
        "{% set s = namespace() %}",  # calls
        "{% set s = a * a %}",
    ],
)
def test_long_renderings_end(monkeypatch, body):
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.05)
    loops = "{% for a in n %}{% for a in n %}" + body + "{% endfor %}{% endfor %}"
    compiled = ChatTemplate("{% set s = namespace(x=0) %}" + loops, "t", {})
    with pytest.raises(ValueError, match=r"more than 0\.05 s"):
        compiled.render([], n=[1] * 3000)
    assert compiled.render([], n=[1]) in ("", "1")


def test_the_budget_is_each_threads_own(monkeypatch):
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.2)
    compiled = ChatTemplate("{% for a in n %}{% for b in n %}{{ a.x }}{% endfor %}{% endfor %}.", "t", {})
    refused = []

    def render():
        try:
            compiled.render([], n=[1] * 3000)
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=render) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert compiled.render([], n=[1]) == "."
    assert len(refused) == 2
