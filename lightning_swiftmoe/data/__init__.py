"""Text corpora as next-token batches, and conversations as packed ones."""

from lightning_swiftmoe.data.chat import ChatData
from lightning_swiftmoe.data.sources import FileSource, HuggingFaceSource, JsonLinesSource, StdlibSource
from lightning_swiftmoe.data.text import TextData

__all__ = ["ChatData", "FileSource", "HuggingFaceSource", "JsonLinesSource", "StdlibSource", "TextData"]
