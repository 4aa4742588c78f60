"""Exceptions raised by commfuse.

Every error that the package raises on purpose derives from :class:`CommfuseError`, so that a
caller can tell them from defects. This module imports nothing: every layer may import it.

* :class:`UsageError`: the input cannot be used (a missing file, an impossible size).
* :class:`BackendUnavailable`: the backend that was asked for cannot run here.
* :class:`CommunicatorError` and its subclasses: communication failed; final for the
  communicator that raised it.

Example::

    try:
        checkpoint = open_checkpoint(path)
    except UsageError as error:
        sys.exit(f"error: {error}")
"""


class CommfuseError(RuntimeError):
    """Base of all errors raised by commfuse."""


class UsageError(CommfuseError, ValueError):
    """Input that cannot be used. The command line prints the message alone and exits with 2.

    The message names what was given and, where there is a choice, what would work.
    """


class BackendUnavailable(CommfuseError):
    """The backend asked for cannot serve this call; the message says why and lists others."""


class CommunicatorError(CommfuseError):
    """Base of communication failures. Each is final: a new communicator is needed to go on."""


class PeerTimeout(CommunicatorError):
    """A peer did not signal in time; names rank, peer, op, call number, expected and seen."""


class PeerMismatch(CommunicatorError):
    """Ranks called different ops, dtypes or shapes; the message names both calls."""


class PeerDied(CommunicatorError):
    """The process of a peer has ended."""


class CommunicatorClosed(CommunicatorError):
    """The communicator was used after it had been closed or had failed."""


class ConcurrentUse(CommunicatorError):
    """Two threads or streams used one communicator at the same time."""
