"""`dsla generate`: text in the terminal, computed in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsla.errors import EngineError

if TYPE_CHECKING:
    from dsla.server.build import Service


def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer, or with --raw to go on from.")],
    model: Annotated[str | None, typer.Option(help="Model folder or hub name. Default: SmolLM2-135M-Instruct.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter folder. Default: the shipped one of the model.")] = None,
    level: Annotated[int, typer.Option(help="How many layers are converted to linear attention.", min=0)] = 0,
    max_tokens: Annotated[int, typer.Option(help="Tokens to write, at most.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.", min=0.0)] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Go on from the prompt as it is, without the chat template.")
    ] = False,
) -> None:
    """Write an answer to PROMPT, token by token."""
    from dsla.engine import SamplingParams
    from dsla.server.build import EngineSettings, build_engine

    service = build_engine(EngineSettings(model=model, adapter=adapter, level=level, adaptive=False))
    tokens = prompt_tokens(service.tokenizer, prompt, raw)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    try:
        write(service, tokens, params)
    except KeyboardInterrupt:
        typer.echo()
        raise typer.Exit(130) from None


def prompt_tokens(tokenizer: Any, prompt: str, raw: bool) -> list[int]:
    """Token ids of a prompt, as a chat of one message or (`raw`) as it is.

    Raises:
        ModelError: the model has no chat template.
        RequestError: the chat template refuses the message.
    """
    from dsla.server.chat import chat_tokens

    if not raw:
        return chat_tokens(tokenizer, [{"role": "user", "content": prompt}])
    tokens: list[int] = tokenizer(prompt)["input_ids"]
    return tokens


def write(service: Service, tokens: list[int], params: Any) -> None:
    """Runs one request and prints its text as it comes.

    Raises:
        RequestError: it does not fit the model.
        EngineError: the engine failed.
    """
    from dsla.server.detokenize import Detokenizer, TokenBytes

    engine, detokenizer = service.engine, Detokenizer(TokenBytes.of(service.tokenizer))
    engine.add_request(tokens, params)
    while engine.has_work:
        for output in engine.step():
            typer.echo(detokenizer.add(output.tokens), nl=False)
            if output.finish_reason == "error":
                raise EngineError(output.error or "the engine failed")
    typer.echo(detokenizer.finish())
