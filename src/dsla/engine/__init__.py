"""The engine: requests, their memory in one arena, the packed decoder, and the step loop that serves any levels.

It knows mixers only through their protocol and levels only as numbers; when to convert is decided in `dsla.adaptive`.
"""

from dsla.engine.arena import Arena
from dsla.engine.async_engine import AsyncEngine
from dsla.engine.constraint import TokenConstraint
from dsla.engine.decoder import PackedDecoder
from dsla.engine.engine import Engine, EngineConfig
from dsla.engine.intake import QUALITY
from dsla.engine.request import Request, StepOutput
from dsla.engine.sampling import MAX_LOGPROBS, SamplingParams, TokenLogprobs, derive_seed
from dsla.engine.signals import Decision, Policy, RequestSummary, Signals
from dsla.engine.stream import RequestStream

__all__ = [
    "MAX_LOGPROBS",
    "QUALITY",
    "Arena",
    "AsyncEngine",
    "Decision",
    "Engine",
    "EngineConfig",
    "PackedDecoder",
    "Policy",
    "Request",
    "RequestStream",
    "RequestSummary",
    "SamplingParams",
    "Signals",
    "StepOutput",
    "TokenConstraint",
    "TokenLogprobs",
    "derive_seed",
]
