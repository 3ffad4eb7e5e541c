"""A worker process for the tasks of `hrmtext.data.engine`."""

from hrmtext.data.engine import run_task
from hrmtext.data.workers import serve

if __name__ == "__main__":
    serve(run_task)
