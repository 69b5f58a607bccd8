"""Training text: files to documents, documents to tokens, tokens to batches."""

from dsla.distill.data.batches import TrainingText, text_for, training_batches
from dsla.distill.data.files import open_text, text_files
from dsla.distill.data.records import read_documents
from dsla.distill.data.sources import Source, TeacherText, check_sources, mixture, parse_source, source_files
from dsla.distill.data.vocabulary import check_tokenizer, check_tokens
from dsla.distill.data.windows import mixed_windows, said_twice, token_windows

__all__ = [
    "Source",
    "TeacherText",
    "TrainingText",
    "check_sources",
    "check_tokenizer",
    "check_tokens",
    "mixed_windows",
    "mixture",
    "open_text",
    "parse_source",
    "read_documents",
    "said_twice",
    "source_files",
    "text_files",
    "text_for",
    "token_windows",
    "training_batches",
]
