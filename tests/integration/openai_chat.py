"""The chat and models routes as OpenAI's package calls them, with the version that is on the path; prints what it read.

Run as a process: `python openai_chat.py URL KEY MODEL`. Written with what all tested majors of the package have.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import openai

ASKED: Any = {"messages": [{"role": "user", "content": "3+4="}], "temperature": 0, "max_tokens": 12}


def streamed(client: openai.OpenAI, model: str) -> tuple[str, int]:
    """The text of a stream, and the tokens that its last chunk counts."""
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(model=model, stream=True, stream_options=options, **ASKED))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return text, chunks[-1].usage.completion_tokens if chunks[-1].usage else 0


async def asked_asynchronously(url: str, key: str, model: str) -> tuple[str, str]:
    """An answer and a stream of the asynchronous client."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        answer = await client.chat.completions.create(model=model, **ASKED)
        text = ""
        async for chunk in await client.chat.completions.create(model=model, stream=True, **ASKED):
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        return answer.choices[0].message.content or "", text


def refusal(client: openai.OpenAI, model: str, **options: object) -> list[Any]:
    """The class, the code and the parameter of the error."""
    given: Any = {**ASKED, **options}
    try:
        client.chat.completions.create(model=model, **given)
    except openai.APIStatusError as error:
        return [type(error).__name__, error.code, error.param]
    return []


def main(url: str, key: str, model: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        answer = client.chat.completions.create(model=model, **ASKED)
        several: Any = {**ASKED, "temperature": 1, "n": 2, "seed": 5, "logprobs": True, "top_logprobs": 2}
        choices = client.chat.completions.create(model=model, **several).choices
        text, tokens = streamed(client, model)
        likely = choices[0].logprobs
        found = {
            "version": openai.__version__,
            "models": [one.id for one in client.models.list()],
            "model": client.models.retrieve(model).id,
            "answer": answer.choices[0].message.content,
            "finish": answer.choices[0].finish_reason,
            "usage": answer.usage.completion_tokens if answer.usage else 0,
            "choices": len({choice.message.content for choice in choices}),
            "top": [len(one.top_logprobs) for one in (likely.content or [])] if likely else [],
            "streamed": [text, tokens],
            "async": list(asyncio.run(asked_asynchronously(url, key, model))),
            "refused": refusal(client, model, temperature=3),
            "unknown": refusal(client, "no-such-model"),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
