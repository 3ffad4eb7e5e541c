"""Conversion to outside formats, each checked by comparing logits with what it wrote."""

from hrmtext.convert.hf import ExportReport, export_hf

__all__ = ["ExportReport", "export_hf"]
