"""Conversion into and out of every form, each checked by comparing logits with what it wrote."""

from hrmtext.convert.hf import ExportReport, export_hf
from hrmtext.convert.run import ConvertReport, convert
from hrmtext.convert.source import Source, open_source

__all__ = ["ConvertReport", "ExportReport", "Source", "convert", "export_hf", "open_source"]
