"""Training: optimizer, schedules, loss, loop, checkpoints, validation, report."""

from hrmtext.train.loop import train, train_on
from hrmtext.train.report import write_report
from hrmtext.train.source import DataSource, FolderSource
from hrmtext.train.state import TrainResult

__all__ = ["DataSource", "FolderSource", "TrainResult", "train", "train_on", "write_report"]
