"""Chat templates like those of seven families of models, written for these tests.

Each has the peculiarities of its family: the first speaker, the roles, the places of tools and
documents, the contents that are trimmed or refused, and the special tokens around them.
"""

from __future__ import annotations

CHATML = """\
{%- if tools %}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}# Tools

You may call one of:
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools><|im_end|>
{% elif messages[0].role != 'system' %}
{{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{%- set rest = messages[1:] if tools and messages[0].role == 'system' else messages %}
{%- for message in rest %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{ message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""

LLAMA_3 = """\
{{- bos_token }}
{%- set ns = namespace(system='', rest=messages) %}
{%- if messages[0]['role'] == 'system' %}
{%- set ns.system = messages[0]['content'] | trim %}
{%- set ns.rest = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: never\\n\\n' }}
{%- if tools is not none %}
{%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\\n\\n' }}{% endfor %}
{%- endif %}
{{- ns.system + '<|eot_id|>' }}
{%- for message in ns.rest %}
{%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ (message['content'] or '') | trim }}
{%- for call in message['tool_calls'] or [] %}
{{- '{"name": "' + call.function.name + '", "parameters": ' }}
{{- call.function.arguments | tojson + '}' }}
{%- endfor %}{{ '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{ message['content'] | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

MISTRAL = """\
{%- set ns = namespace(system='', turn=0) %}
{%- if messages[0].role == 'system' %}
{%- set ns.system = messages[0].content + '\\n\\n' %}
{%- endif %}
{{- bos_token }}
{%- for message in messages if message.role != 'system' %}
{%- if message.role == 'user' %}
{%- if ns.turn % 2 %}{{ raise_exception('user and assistant must take turns') }}{% endif %}
{%- set ns.turn = ns.turn + 1 %}
{%- if tools and loop.last %}
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST] ' }}{% if loop.first %}{{ ns.system }}{% endif %}{{ message.content + '[/INST]' }}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS] ' + message.content + '[/TOOL_RESULTS]' }}
{%- elif message.tool_calls is defined and message.tool_calls %}
{{- '[TOOL_CALLS] ' + message.tool_calls | map(attribute='function') | list | tojson + eos_token }}
{%- else %}
{%- set ns.turn = ns.turn + 1 %}
{%- generation %}{{ ' ' + message.content | trim + eos_token }}{% endgeneration %}
{%- endif %}
{%- endfor %}"""

GEMMA = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{{- raise_exception('there is no system role') }}
{%- endif %}
{%- if message['role'] in ('user', 'assistant') %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate: user, assistant, user') }}
{%- endif %}
{%- endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' }}
{%- if role == 'model' %}{% generation %}{{ message['content'] | trim }}{% endgeneration %}
{%- else %}{{ message['content'] | trim }}{% endif %}
{{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

PHI_3 = """\
{% for message in messages %}
{%- if message['role'] == 'assistant' -%}
<|assistant|>
{% generation %}{{ message['content'] }}<|end|>
{% endgeneration %}
{%- else -%}
<|{{ message['role'] }}|>
{{ message['content'] }}<|end|>
{% endif %}
{%- endfor -%}
{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}"""

DEEPSEEK = """\
{%- set ns = namespace(system='', after_tool=false) %}
{%- for message in messages if message['role'] == 'system' %}
{%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + message['content'] %}
{%- endfor %}
{{- bos_token + ns.system }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- '<\uff5cUser\uff5c>' + message['content'] }}
{%- set ns.after_tool = false %}
{%- elif message['role'] == 'tool' %}
{{- '<\uff5ctool▁output▁begin\uff5c>' + message['content'] + '<\uff5ctool▁output▁end\uff5c>' }}
{%- set ns.after_tool = true %}
{%- elif message['role'] == 'assistant' %}
{%- set content = (message['content'] or '').split('</think>')[-1] %}
{%- if not ns.after_tool %}{{ '<\uff5cAssistant\uff5c>' }}{% endif %}
{%- generation %}{{ content }}
{%- for call in message['tool_calls'] or [] %}
{{- '<\uff5ctool▁call▁begin\uff5c>' + call['function']['name'] + '\\n```json\\n' }}
{{- call['function']['arguments'] | tojson + '\\n```<\uff5ctool▁call▁end\uff5c>' }}
{%- endfor %}{{ '<\uff5cend▁of▁sentence\uff5c>' }}{% endgeneration %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\\n' }}{% endif %}"""

COMMAND_R = """\
{{- bos_token }}
{%- if documents %}
{{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|># Documents\\n' }}
{%- for document in documents %}
{{- 'Document: ' ~ loop.index0 ~ '\\n' }}
{%- for key, value in document.items() %}{{ key ~ ': ' ~ value ~ '\\n' }}{% endfor %}
{%- endfor %}
{{- '<|END_OF_TURN_TOKEN|>' }}
{%- endif %}
{%- for message in messages %}
{%- set name = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[message.role] %}
{{- '<|START_OF_TURN_TOKEN|><|' + name + '_TOKEN|>' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
{%- else %}{{ message.content | trim }}{% endif %}
{{- '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}
{%- endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "llama-3": LLAMA_3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi-3": PHI_3,
    "deepseek": DEEPSEEK,
    "command-r": COMMAND_R,
}

SPECIAL_TOKENS = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<start_of_turn>", "<end_of_turn>", "<|system|>",
    "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<\uff5cUser\uff5c>",
    "<\uff5cAssistant\uff5c>", "<\uff5cend▁of▁sentence\uff5c>", "<\uff5ctool▁output▁begin\uff5c>",
    "<\uff5ctool▁output▁end\uff5c>", "<\uff5ctool▁call▁begin\uff5c>",
    "<\uff5ctool▁call▁end\uff5c>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
]  # fmt: skip
