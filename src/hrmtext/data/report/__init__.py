"""`hrm-text data report`: a page about a prepared folder, its manifest, audits as pages."""

from hrmtext.data.report.audit import write_audit
from hrmtext.data.report.manifest import MANIFEST_FILE, write_manifest
from hrmtext.data.report.page import PAGE_FILE, write_report

__all__ = ["MANIFEST_FILE", "PAGE_FILE", "write_audit", "write_manifest", "write_report"]
