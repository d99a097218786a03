"""Small chat templates, written for the tests, that each break the prefix in one way, or fail."""

from __future__ import annotations

# Writes all that a chat may hold, and changes nothing later on.
APPEND_ONLY = """\
{%- if tools %}{{ '<|tools|>' + tools | tojson + '<|end|>' }}{% endif %}
{%- for message in messages %}
{{- '<|' + message.role + '|>' }}
{%- if message.reasoning_content %}
{{- '<think>' + message.reasoning_content + '</think>' }}
{%- endif %}
{%- if message.content is string %}{{ message.content }}
{%- elif message.content %}
{%- for part in message.content %}
{{- '<image>' if part.type == 'image' else part.text }}
{%- endfor %}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- set arguments = call.function.arguments %}
{{- '<call>' + call.function.name + ' ' }}
{{- arguments if arguments is string else arguments | tojson }}
{{- '</call>' }}
{%- endfor %}
{{- '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

# Its thinking is written for the last answer alone, as Qwen 3 does, unless a switch says otherwise.
DROPS_THINKING = APPEND_ONLY.replace(
    "{%- if message.reasoning_content %}",
    "{%- if message.reasoning_content and (loop.last or keep_thoughts | default(false)) %}",
)

# The prompt of a model that thinks opens the thinking, and an answer without it closes it at once.
OPENS_THINKING = APPEND_ONLY.replace(
    "{{ '<|assistant|>' }}",
    "{{ '<|assistant|>' + ('' if effort is defined and effort == 'none' else '<think>') }}",
)

# With the date, and with the minute; a caller may pass the date.
DATED = "{{ (date_string or strftime_now('%d %B %Y')) + '\\n' }}" + APPEND_ONLY
TIMED = "{{ strftime_now('%H:%M') + '\\n' }}" + APPEND_ONLY
RANDOM = "{{ range(100000) | random | string + '\\n' }}" + APPEND_ONLY

# The text of an answer is trimmed, as Llama 3 and Gemma do.
TRIMS = APPEND_ONLY.replace(
    "{%- if message.content is string %}{{ message.content }}",
    "{%- if message.content is string %}{{ message.content | trim }}",
)

# The system prompt stands in the last user's message, as Mistral Nemo does.
SYSTEM_LAST = """\
{%- set ns = namespace(system='') %}
{%- for message in messages if message.role == 'system' %}
{%- set ns.system = ns.system + message.content + '\\n' %}
{%- endfor %}
{%- for message in messages if message.role != 'system' %}
{{- '<|' + message.role + '|>' + (ns.system if loop.last else '') + message.content + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

# All system prompts stand first, as DeepSeek does.
SYSTEMS_FIRST = SYSTEM_LAST.replace("(ns.system if loop.last else '') + ", "").replace(
    "{%- for message in messages if message.role != 'system' %}",
    "{{ ns.system }}{%- for message in messages if message.role != 'system' %}",
)

# Arguments are written as JSON once more if they are a string, as Qwen 2.5 does.
QUOTES_ARGUMENTS = APPEND_ONLY.replace(
    "arguments if arguments is string else arguments | tojson", "arguments | tojson"
)

# Only the last image is written.
LAST_IMAGE = APPEND_ONLY.replace(
    "'<image>' if part.type == 'image'",
    "('<image>' if message == (messages | selectattr('role', 'equalto', 'user') | list)[-1] or"
    " messages | length < 4) if part.type == 'image'",
)

# The last message ends with another token than the earlier ones, as gpt-oss does.
OTHER_END = APPEND_ONLY.replace(
    "{{- '<|end|>\\n' }}",
    "{{- '<|return|>' if loop.last and message.role == 'assistant' else '<|end|>' }}",
)

# An answer that is continued is written with a heading that a finished one does not have.
HEADS_LAST = APPEND_ONLY.replace(
    "{{- '<|' + message.role + '|>' }}",
    "{{- '<|' + message.role + '|>' }}{{ 'Draft: ' if loop.last and loop.length > 1 and"
    " message.role == 'assistant' }}",
)

# Takes lists of parts alone, as templates of vision models do.
LISTS_ONLY = """\
{%- for message in messages %}
{{- '<|' + message.role + '|>' }}
{%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}
{{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

REFUSES_SYSTEM = """\
{%- for message in messages %}
{%- if message.role not in ['user', 'assistant'] %}
{{- raise_exception('Only users and assistants may speak.') }}
{%- endif %}
{{- '<|' + message.role + '|>' + message.content + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

# Each goes wrong for chats with a system prompt alone.
_BAD = "{%- if messages[0].role == 'system' %}BAD{% endif %}" + APPEND_ONLY
ENDLESS = _BAD.replace(
    "BAD",
    "{% for a in range(90000) %}{% for b in range(90000) %}{% if a < 0 %}x{% endif %}"
    "{% endfor %}{% endfor %}",
)
HUGE = _BAD.replace("BAD", "{% for a in range(90000) %}{{ '-' * 1000 }}{% endfor %}")
GREEDY = _BAD.replace("BAD", "{{ ('-' * 99999999999) | length }}")
RAISES = _BAD.replace("BAD", "{{ messages.missing.missing }}")
DEEP = _BAD.replace("BAD", "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}")
