"""Which network the ranks of several hosts meet on.

Gloo would take the address that the host's name stands for: on many systems a loopback one, to which no other host
can connect.
"""

import contextlib
import fcntl
import ipaddress
import logging
import os
import socket
import struct
from collections.abc import MutableMapping
from pathlib import Path

from infer.launch import RankEnv

logger = logging.getLogger(__name__)

VARIABLE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915  # <linux/sockios.h>; the ioctl takes and fills a struct ifreq of 40 bytes


def choose(env: RankEnv, environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets GLOO_SOCKET_IFNAME, unless the user has, to the interface that leads to the master address.

    Only where there are ranks on other hosts. Says what it chose; and where it could not, what to do.
    """
    if env.local_world_size == env.world_size or environ.get(VARIABLE):
        return
    tells = env.local_rank == 0  # one rank of a host for all
    address = _address_towards(env.master_addr, env.master_port)
    name = None if address is None or address.is_loopback else _interface_of(address)
    if name is not None:
        environ[VARIABLE] = name
        if tells:
            logger.info("gloo uses the interface %s (%s), which leads to %s", name, address, env.master_addr)
    elif tells:
        logger.warning(
            "no interface of this host can be told to lead to the others (to the master address %s it uses %s); "
            "if the ranks cannot connect, set %s to the one between the hosts", env.master_addr, address, VARIABLE,
        )  # fmt: skip


def _address_towards(host: str, port: int) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """This host's own address on the way to another. Nothing is sent: a datagram socket only looks up its route."""
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, to in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(to)
                return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
    return None


def _interface_of(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
    """The interface that has this address; None where there is none, or no way to tell."""
    if address.version == 6:
        with contextlib.suppress(OSError):
            for line in Path("/proc/net/if_inet6").read_text().splitlines():
                digits, *_, name = line.split()
                if digits == address.packed.hex():
                    return name
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                request = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("40s", name.encode()))
                if request[20:24] == address.packed:  # ifr_addr, a sockaddr_in: family, port, address
                    return name
    return None
