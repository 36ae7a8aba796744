"""Which host names and addresses are loopback. Sends no DNS query."""

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address without brackets, is reached from this machine only.

    `localhost` and the names under it are (RFC 6761), and the addresses 127.0.0.0/8 and ::1 in every notation that the
    system's resolver reads, such as `127.1`.
    """
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = address_of(host)
    return address is not None and address.is_loopback


def address_of(host: str) -> IPv4Address | IPv6Address | None:
    """The IP address that `host` denotes, an IPv4-mapped IPv6 address as IPv4; None for a name."""
    try:
        address = ip_address(host)
    except ValueError:
        pass
    else:
        return getattr(address, "ipv4_mapped", None) or address
    try:
        return IPv4Address(socket.inet_aton(host))  # 127.1, 0x7f000001, 2130706433
    except (OSError, ValueError):
        return None
