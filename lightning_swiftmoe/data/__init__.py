"""Text corpora as next-token batches."""

from lightning_swiftmoe.data.sources import FileSource, HuggingFaceSource, StdlibSource
from lightning_swiftmoe.data.text import TextData

__all__ = ["FileSource", "HuggingFaceSource", "StdlibSource", "TextData"]
