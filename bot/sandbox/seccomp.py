"""The system calls no sandboxed process may make, as a classic BPF program built here and loaded by bubblewrap."""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Mapping

from bot.sandbox.contract import SandboxUnavailable

ALLOW = 0x7FFF0000
ERRNO = 0x00050000
KILL_PROCESS = 0x80000000

_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT, _SECOND_ARGUMENT = 0, 4, 16, 24
_X32 = 0x40000000
_CLONE_NEWUSER = 0x10000000
_TERMINAL_INJECTION = (0x5412, 0x541C)
_SOCKET_FAMILIES = (1, 2, 10, 16)

AUDIT_ARCHITECTURE: Mapping[str, int] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# name: (x86_64, aarch64); from the kernel's unistd_64.h and asm-generic/unistd.h
DENIED: Mapping[str, tuple[int, int | None]] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "lookup_dcookie": (212, 18),
    "uselib": (134, None),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
}
FILTERED: Mapping[str, tuple[int, int]] = {
    "clone": (56, 220),
    "clone3": (435, 435),
    "ioctl": (16, 29),
    "socket": (41, 198),
    "socketpair": (53, 199),
}


def number(name: str, machine: str | None = None) -> int | None:
    """The number of a system call listed here on `machine` (default: this one); None where it does not exist."""
    column = tuple(AUDIT_ARCHITECTURE).index(machine or platform.machine())
    return (DENIED.get(name) or FILTERED[name])[column]


def program(machine: str | None = None) -> bytes:
    """The filter for `machine` (default: this one) as `struct sock_filter[]`; an unknown machine raises SandboxUnavailable."""
    machine = machine or platform.machine()
    if machine not in AUDIT_ARCHITECTURE:
        raise SandboxUnavailable(f"no system call filter is known for `{machine}`", "Run the service on x86_64 or aarch64.")
    code: list[tuple[int, int, int, int]] = []

    def refuse_unless_next(jump: int, value: int, result: int) -> None:
        code.append((jump, 0, 1, value))
        code.append((_RETURN, 0, 0, result))

    def known(name: str) -> int:
        found = number(name, machine)
        if found is None:
            raise ValueError(name)
        return found

    code.append((_LOAD, 0, 0, _ARCHITECTURE))
    code.append((_JUMP_EQUAL, 1, 0, AUDIT_ARCHITECTURE[machine]))
    code.append((_RETURN, 0, 0, KILL_PROCESS))
    code.append((_LOAD, 0, 0, _NUMBER))
    if machine == "x86_64":
        refuse_unless_next(_JUMP_GREATER_EQUAL, _X32, KILL_PROCESS)
    for name in DENIED:
        call = number(name, machine)
        if call is not None:
            refuse_unless_next(_JUMP_EQUAL, call, ERRNO | errno.EPERM)
    refuse_unless_next(_JUMP_EQUAL, known("clone3"), ERRNO | errno.ENOSYS)

    code.append((_JUMP_EQUAL, 0, 4, known("clone")))
    code.append((_LOAD, 0, 0, _FIRST_ARGUMENT))
    refuse_unless_next(_JUMP_ANY_BIT, _CLONE_NEWUSER, ERRNO | errno.EPERM)
    code.append((_RETURN, 0, 0, ALLOW))

    code.append((_JUMP_EQUAL, 0, 2 + 2 * len(_TERMINAL_INJECTION), known("ioctl")))
    code.append((_LOAD, 0, 0, _SECOND_ARGUMENT))
    for request in _TERMINAL_INJECTION:
        refuse_unless_next(_JUMP_EQUAL, request, ERRNO | errno.EPERM)
    code.append((_RETURN, 0, 0, ALLOW))

    code.append((_JUMP_EQUAL, 1, 0, known("socket")))
    code.append((_JUMP_EQUAL, 0, 2 + 2 * len(_SOCKET_FAMILIES), known("socketpair")))
    code.append((_LOAD, 0, 0, _FIRST_ARGUMENT))
    for family in _SOCKET_FAMILIES:
        refuse_unless_next(_JUMP_EQUAL, family, ALLOW)
    code.append((_RETURN, 0, 0, ERRNO | errno.EAFNOSUPPORT))

    code.append((_RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
