"""Refuses every Internet connection of the interpreter that finds this file, and logs the attempt.

The test suite loads it, and puts its folder on PYTHONPATH so that child interpreters load it too. The log
named by PEFTDYNO_NETWORK_LOG catches attempts whose error was swallowed, or raised in a thread or a child.
"""

import os
import socket
import sys

LOG = "PEFTDYNO_NETWORK_LOG"


class NetworkBlocked(BaseException):
    """Not an Exception, so that code falling back to a cache when the network fails cannot hide it."""


def refuse(event: str, args: tuple) -> None:
    """Audit hook: raise before a connection, a datagram or a name lookup leaves the process."""
    if event in ("socket.connect", "socket.sendto"):
        target = args[1] if args[0].family in (socket.AF_INET, socket.AF_INET6) else None
    elif event == "socket.getaddrinfo":
        target = args[0]
    else:
        return
    if target:
        test = os.environ.get("PYTEST_CURRENT_TEST", "code outside any test")
        with open(os.environ[LOG], "a") as log:
            log.write(f"{test}: {event} {target}\n")
        raise NetworkBlocked(f"{test} reached for the network: {event} {target}")


if LOG in os.environ:
    sys.addaudithook(refuse)
