"""Errors people can act on: the message names the thing, what was found, what was expected, and what to do."""


class DslaError(Exception):
    """Base of all errors this package raises on purpose."""


class ModelError(DslaError):
    """A model cannot be had, read or supported."""


class AdapterError(DslaError):
    """An adapter is missing, damaged, or belongs to another model."""


class PlanError(DslaError):
    """A plan is missing, damaged, or asked for what it does not have."""


class ConfigError(DslaError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class DataError(DslaError):
    """Training or evaluation data is missing, empty, binary or too short."""


class TrainingError(DslaError):
    """Training cannot go on."""


class KernelError(DslaError):
    """The native kernels cannot be had on this machine."""


class EngineError(DslaError):
    """The engine cannot do what was asked."""


class BusyError(EngineError):
    """Too many requests wait: try again later."""


class DrainingError(EngineError):
    """The engine ends what it has accepted and takes nothing new."""


class RequestError(DslaError):
    """A request is wrong.

    Args:
        message: what is wrong.
        param: the request field it is about, if one.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
