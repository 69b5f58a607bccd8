"""The probabilities of an answer's tokens, in the two forms of the OpenAI API."""

from __future__ import annotations

from collections.abc import Sequence

from dsla.server.detokenize import TokenBytes
from dsla.server.generation import TokenReport
from dsla.server.responses import ChatLogprobs, TextLogprobs, TokenLogprob, TopLogprob


class LogprobWriter:
    """Writes the reports of tokens.

    Args:
        names: bytes of the model's tokens, those of special ones included.
    """

    def __init__(self, names: TokenBytes) -> None:
        self._names = names

    def chat(self, reports: Sequence[TokenReport]) -> ChatLogprobs:
        """`logprobs` of a choice of a chat completion."""
        content = []
        for report in reports:
            own, *top = [self._entry(token, logprob) for token, logprob in report.logprobs]
            content.append(TokenLogprob(**own.model_dump(), top_logprobs=top))
        return ChatLogprobs(content=content)

    def text(self, reports: Sequence[TokenReport]) -> TextLogprobs:
        """`logprobs` of a choice of a completion; the most likely tokens include the chosen one."""
        tops: list[dict[str, float]] = []
        for report in reports:
            top: dict[str, float] = {}
            for token, logprob in (*report.logprobs[1:], report.logprobs[0]):
                top.setdefault(self._name(token), logprob)
            tops.append(top)
        own = [report.logprobs[0] for report in reports]
        return TextLogprobs(
            tokens=[self._name(token) for token, _ in own],
            token_logprobs=[logprob for _, logprob in own],
            top_logprobs=tops,
            text_offset=[report.offset for report in reports],
        )

    def _entry(self, token: int, logprob: float) -> TopLogprob:
        return TopLogprob(token=self._name(token), logprob=logprob, bytes=list(self._names[token]))

    def _name(self, token: int) -> str:
        """Its text; its bytes, written out, where they are no text; its id where it has none."""
        content = self._names[token]
        try:
            return content.decode() or f"token_id:{token}"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
