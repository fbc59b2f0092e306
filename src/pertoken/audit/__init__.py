"""What a recipe would train on, before a step is paid for: files, samples, problems by file:line, memory."""

from pertoken.audit.audit import Audit, audit

__all__ = ["Audit", "audit"]
