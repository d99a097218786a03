"""Clients that are not in the test extra see their answers and cached tokens, too.

Install them where the tests run: `pip install langchain-openai`; `npm install openai` in a folder
whose node_modules TOKCACHE_NODE_MODULES names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.gateways import SYSTEM, Gateway


@pytest.mark.filterwarnings("default")  # those of another project's libraries
@pytest.mark.parametrize("is_responses", [False, True])
def test_langchain_sees_cached_tokens(
    served: Gateway, is_responses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("langchain_openai", reason="needs langchain-openai")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    client = library.ChatOpenAI(
        base_url=f"{served.url}/v1",
        api_key="any",
        model="any",
        temperature=0,
        max_tokens=5,
        max_retries=0,
        stream_usage=True,
        use_responses_api=is_responses,
    )
    asked: list[Any] = [("system", f"langchain {is_responses}. {SYSTEM}"), ("human", "hi")]
    first = client.invoke(asked)
    assert first.usage_metadata["input_tokens"] > 200
    asked += [first, ("human", "more")]
    second = client.invoke(asked)
    n_held = first.usage_metadata["input_tokens"] - 4
    assert second.usage_metadata["input_token_details"]["cache_read"] >= n_held
    whole: Any = None
    for chunk in client.stream(asked):
        whole = chunk if whole is None else whole + chunk
    assert whole.text == second.text
    assert whole.usage_metadata["input_token_details"]["cache_read"] >= n_held


_SCRIPT = """
const OpenAI = require("openai");
const client = new OpenAI({ baseURL: process.argv[1] + "/v1", apiKey: "any", maxRetries: 0 });
const system = process.argv[2];
async function chat() {
  const messages = [{ role: "system", content: "npm. " + system }, { role: "user", content: "hi" }];
  const asked = { model: "any", messages, max_tokens: 5, temperature: 0 };
  const first = await client.chat.completions.create(asked);
  messages.push(first.choices[0].message, { role: "user", content: "more" });
  const second = await client.chat.completions.create(asked);
  const options = { include_usage: true };
  let text = "", usage = null;
  for await (const chunk of await client.chat.completions.create(
      { ...asked, stream: true, stream_options: options })) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  return { prompt: first.usage.prompt_tokens, text, whole: second.choices[0].message.content,
    cached: [second.usage, usage].map((one) => one.prompt_tokens_details.cached_tokens) };
}
async function responses() {
  const asked = { model: "any", instructions: "npm responses. " + system, input: "hi",
    max_output_tokens: 5, temperature: 0 };
  const first = await client.responses.create(asked);
  const second = await client.responses.create(asked);
  let last = null;
  for await (const event of await client.responses.create({ ...asked, stream: true })) last = event;
  return { prompt: first.usage.input_tokens, text: last.response.output[0].content[0].text,
    whole: second.output_text,
    cached: [second, last.response].map((one) => one.usage.input_tokens_details.cached_tokens) };
}
async function refused() {
  try {
    await client.chat.completions.create({ model: "any", messages: [], n: 2 });
  } catch (error) {
    return { name: error.constructor.name, status: error.status };
  }
}
(async () => {
  console.log(JSON.stringify([await chat(), await responses(), await refused()]));
})();
"""


def test_the_npm_package_openai_sees_cached_tokens(served: Gateway) -> None:
    node, modules = shutil.which("node"), os.environ.get("TOKCACHE_NODE_MODULES", "")
    if node is None:
        pytest.skip("needs node")
    if not (Path(modules) / "openai").is_dir():
        pytest.skip("TOKCACHE_NODE_MODULES names no folder with the npm package openai")
    done = subprocess.run(  # noqa: S603 (our own script)
        [node, "-e", _SCRIPT, served.url, SYSTEM],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"NODE_PATH": modules},
    )
    assert done.returncode == 0, done.stderr
    chat, responses, refused = json.loads(done.stdout)
    for told in (chat, responses):
        assert told["prompt"] > 200
        assert told["text"] == told["whole"] != ""
        assert min(told["cached"]) >= told["prompt"] - 4
    assert refused == {"name": "BadRequestError", "status": 400}
