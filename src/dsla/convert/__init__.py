"""Conversion as data and as surgery: plans, adapters, and the Hugging Face face of a converted model."""

from dsla.convert.adapter import Adapter, load_adapter
from dsla.convert.load import find_adapter, load, read_config
from dsla.convert.plan import Plan, Teacher

__all__ = ["Adapter", "Plan", "Teacher", "find_adapter", "load", "load_adapter", "read_config"]
