"""Where the processes of a run find each other: the address of this machine, and ports of its own.

On clusters a name is no address: Debian has a machine's own name mean 127.0.1.1, which would send
the others to themselves, and machines have several networks, not all of which lead to the others.
So the address is the one from which packets to another machine would leave, unless
NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME choose the network.
"""

import os
import socket

from mini_r1 import InputError, RunFailed

LOOPBACK = "127.0.0.1"
INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
PORTS_TRIED = 1000

_reserved: list[socket.socket] = []  # until this process ends


def reserve_port(first: int = 0) -> int:
    """A port of this machine that nobody else is given from now on, until this process ends.

    Linux gives a port that is bound to no one but those who reuse addresses, once its owner does,
    too: what torch's stores and vLLM listen with. A port that was only looked for would be taken by
    another run in the minutes that a model needs to load.

    Args:
        first: the lowest to take; any with 0.

    Raises:
        RunFailed: there is none.
    """
    for port in range(first, first + PORTS_TRIED) if first else (0,):
        held = socket.socket()
        try:
            held.bind(("", port))
        except OSError:
            held.close()
            continue
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _reserved.append(held)
        return held.getsockname()[1]
    raise RunFailed(f"no port from {first} to {first + PORTS_TRIED - 1} is free on this machine")


def listens(address: str, port: int) -> bool:
    """Whether somebody listens at a port of another machine."""
    try:
        with socket.create_connection((address, port), timeout=5):
            return True
    except OSError:
        return False


def resolve(name: str) -> str:
    """The address that a name has on this machine; of version 4 where it has one, as vLLM wants.

    Raises:
        InputError: it has none.
    """
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise InputError(
            f"its name has no address here ({error.strerror}); see 'getent hosts {name}'",
            where=name,
        ) from None
    return str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0])


def address_towards(other: str) -> str:
    """The address of this machine at which the one with the address `other` reaches it.

    Raises:
        InputError: nothing leads there, or the network that was chosen is none of this machine.
    """
    for variable in INTERFACE_VARIABLES:
        if chosen := os.environ.get(variable):
            # NCCL excludes what follows ^; all that it might then choose is not for us to guess.
            return _address_towards(other) if chosen[0] == "^" else _chosen(variable, chosen)
    return _address_towards(other)


def _address_towards(other: str) -> str:
    family = socket.AF_INET6 if ":" in other else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((other, 9))  # sends nothing
        except OSError as error:
            raise InputError(
                f"no way leads there from {socket.gethostname()} ({error.strerror}); name the "
                f"interface that does, with {INTERFACE_VARIABLES[0]}",
                where=other,
            ) from None
        return probe.getsockname()[0]


def _chosen(variable: str, chosen: str) -> str:
    """The address of the first interface that such a variable names, by prefix or `=` exactly."""
    addresses = _interfaces()
    exact = chosen.startswith("=") or variable.startswith("GLOO")
    for wanted in chosen.lstrip("=").split(","):
        for name, address in addresses.items():
            if name == wanted or (not exact and name.startswith(wanted)):
                return address
    known = ", ".join(addresses)
    raise InputError(
        f"'{chosen}' names no interface of {socket.gethostname()} with an IPv4 address; it has "
        f"{known}",
        where=variable,
    )


def interface_of(address: str) -> str | None:
    """The interface of this machine that has an address."""
    return next((name for name, its in _interfaces().items() if its == address), None)


def _interfaces() -> dict[str, str]:
    """The interfaces of this machine that have an address of version 4."""
    import psutil

    return {
        name: entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }
