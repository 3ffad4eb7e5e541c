"""A worker process that tokenises strata."""

from hrmtext.data.tokenize import handler
from hrmtext.data.workers import serve

if __name__ == "__main__":
    serve(handler())
