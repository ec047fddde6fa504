"""The OpenAI server: a picture, a budget of its own, and a bad one that harms nobody."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from serving.vllm.serving import BOTH, ROOT, arguments, golden

NAME = BOTH[0]
PATIENCE = 240  # seconds until it listens, on a busy machine
MARK = "<image>"


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[openai.OpenAI]:
    """A client of a server that runs while the tests of this file do."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "template.jinja").write_text(
        "{% for part in messages[0].content %}{{ part.text if part.type == 'text' else '<image>' }}"
        "{% if not loop.last %} {% endif %}{% endfor %}"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    overrides = arguments(NAME, {"method": "divprune", "keep_ratio": 0.25, "max_keep_ratio": 0.6})["hf_overrides"]
    settings = {
        "model": str(ROOT / NAME),
        "served-model-name": NAME,
        "host": "127.0.0.1",
        "port": port,
        "dtype": "float32",
        "max-model-len": 256,
        "max-num-seqs": 4,
        "num-gpu-blocks-override": 64,
        "chat-template": folder / "template.jinja",
        "chat-template-content-format": "openai",
        "hf-overrides": json.dumps(overrides),
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += ["--trust-request-mm-kwargs", *(f"--{name}={value}" for name, value in settings.items())]
    log = folder / "log"
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, log)
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as asking:
                yield asking
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def wait_for(address: str, server: subprocess.Popen, log: Any) -> None:
    """Return when the server listens."""
    for _ in range(PATIENCE):
        if server.poll() is not None:
            raise RuntimeError(f"the server ended:\n{log.read_text()[-4000:]}")
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(1)
        else:
            return
    raise RuntimeError(f"the server does not listen after {PATIENCE} s:\n{log.read_text()[-4000:]}")


def ask(client: openai.OpenAI, asked: dict[str, Any], **options: Any) -> Any:
    """The answer of the server to one of the long requests."""
    images, parts = iter(asked["images"]), []
    for words in asked["text"].split(" "):
        if words == MARK:
            data = base64.b64encode((ROOT / NAME / f"{next(images)}.png").read_bytes()).decode()
            parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
        else:
            parts.append({"type": "text", "text": words})
    own = {"mm_processor_kwargs": options} if options else {}
    return client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": parts}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        extra_body={**own, "min_tokens": 6, "ignore_eos": True, "return_tokens_as_token_ids": True},
    )


def ids(answer: Any) -> list[int]:
    """The tokens of an answer."""
    return [int(each.token.removeprefix("token_id:")) for each in answer.choices[0].logprobs.content]


def test_answers_and_lengths_of_prompts_are_those_of_the_budget(client):
    found = golden(NAME)
    lengths = {}
    for ratio, options in (("0.25", {}), ("0.6", {"visual_keep_ratio": 0.6}), ("0.1", {"visual_keep_ratio": 0.1})):
        for number, asked in enumerate(found["long"][:3]):
            answer = ask(client, asked, **options)
            assert ids(answer) == found["ratios"][ratio][number]["ids"]
        lengths[ratio] = answer.usage.prompt_tokens
    whole = found["ratios"]["1.0"][2]["prompt"]
    assert lengths["0.1"] < lengths["0.25"] < lengths["0.6"] < whole


@pytest.mark.parametrize(
    "options",
    [{"visual_keep_ratio": 1.5}, {"visual_keep_ratio": 0.9}, {"visual_num_keep": 0}, {"visual_keep_ratio": "half"}],
    ids=repr,
)
def test_a_bad_budget_is_the_requests_fault_and_the_server_lives_on(client, options):
    found = golden(NAME)
    with pytest.raises(openai.BadRequestError, match=r"keep_ratio|num_keep") as refused:
        ask(client, found["long"][0], **options)
    assert refused.value.status_code == 400
    assert ids(ask(client, found["long"][0])) == found["ratios"]["0.25"][0]["ids"]
