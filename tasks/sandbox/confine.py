"""Limits on what a process may reach: namespaces with files of their own, a system call filter, Landlock, limits.

Linux only apart from the resource limits. Each function says whether it worked, so that the caller can tell which of
the protections hold on this machine. System calls go through ctypes: Python 3.11 has no functions for them.
"""

import contextlib
import ctypes
import os
import platform
import resource
import shutil
import struct
import sys

LINUX = sys.platform == "linux"
libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
ISOLATED = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
ALL_CLONE_NEW = ISOLATED | CLONE_NEWUSER | 0x02000000  # the last one: cgroup

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 1 << 12, 1 << 14, 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446  # the same on every machine
AT_FDCWD, AT_RECURSIVE, MNT_DETACH = -100, 0x8000, 2

SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
OPEN_FOLDERS = ("/dev/shm", "/tmp", "/var/tmp")  # the first one is memory
INODES = 2_000  # files and folders that a program can have at a time
FIRST_UID = 1_000_000_000  # users nobody has; one per program, so that its processes can be counted

# Name: number on (x86_64, aarch64). Memory that belongs to no process, so that no limit counts it and some of it
# outlives its maker: System V segments, semaphores and queues, POSIX queues, files in memory, pages lent to a pipe.
UNCOUNTED = {
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmdt": (67, 197),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "vmsplice": (278, 75),
}
# Refused to every program: these, sockets, other processes, mounts and namespaces, and kernel interfaces that no
# ordinary program needs. Pairs of connected sockets (socketpair) are still to be had.
REFUSED = UNCOUNTED | {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "open_tree": (428, 428),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
}
CLONE, CLONE3 = (56, 220), (435, 435)
FORKS = {"clone": CLONE, "fork": (57, 220), "vfork": (58, 220)}
# Without a process namespace also: what acts on other processes, unless their first argument is the caller.
ON_SELF_ONLY = {"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "prlimit64": (302, 261)}
ON_OTHERS = {
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
}
MACHINES = {"x86_64": (0, 0xC000003E, 155), "aarch64": (1, 0xC00000B7, 41)}  # column, audit number, pivot_root


def prctl(*numbers: int) -> bool:
    """Call prctl(2) with up to five numbers; return whether it worked. False outside Linux."""
    return LINUX and libc.prctl(*[ctypes.c_ulong(n) for n in (*numbers, *[0] * (5 - len(numbers)))]) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Namespaces


def enter_namespaces(folder: str, disk_mb: int) -> bool:
    """Give this process and its children a file system, processes and a network of their own; False if not allowed.

    Children live in a new process namespace and die with the first of them. The files are the system's folders and
    Python's, read-only, and an empty /tmp in memory; everything else is out of sight. `folder` serves as mount point.
    """
    if not LINUX or platform.machine() not in MACHINES or not hasattr(libc, "unshare"):
        return False
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(ISOLATED) != 0:
        if libc.unshare(ISOLATED | CLONE_NEWUSER) != 0:
            return False
        try:
            for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        except OSError:
            return False
    try:
        _change_root(folder, disk_mb)
    except OSError:
        return False
    return True


def _change_root(root: str, disk_mb: int) -> None:
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk_mb}m,nr_inodes={INODES},mode=755")
    for path in _visible_folders():
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
            continue
        os.makedirs(root + path, exist_ok=True)
        _mount(path, root + path, None, MS_BIND | MS_REC)
        attributes = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID, 0, 0, 0)
        _check(
            libc.syscall(MOUNT_SETATTR, AT_FDCWD, os.fsencode(root + path), AT_RECURSIVE, attributes, len(attributes))
        )
    os.mkdir(root + "/dev")
    for path in DEVICES:
        open(root + path, "w").close()
        _mount(path, root + path, None, MS_BIND)
    os.mkdir(root + "/tmp")
    os.chmod(root + "/tmp", 0o1777)
    os.chdir(root)
    _check(libc.syscall(MACHINES[platform.machine()][2], b".", b"."))  # pivot_root: the old root lies over the new one
    _check(libc.umount2(b".", MNT_DETACH))
    os.chdir("/tmp")


def _visible_folders() -> list[str]:
    """System folders and Python's own, those inside of others left out."""
    chosen: list[str] = []
    for path in (*SYSTEM_FOLDERS, sys.base_prefix, sys.base_exec_prefix):
        inside = any(os.path.commonpath((path, other)) == other for other in chosen)
        if os.path.isdir(path) and not inside:
            chosen.append(path)
    return chosen


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    _check(libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]))


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# ---------------------------------------------------------------------------------------------------------------------
# Rights and limits


def drop_rights(folder: str) -> bool:
    """Give up root and every capability for good; True if this process now is a user that nobody else is.

    folder: what this user must be able to write to. Where only root can reach it or Python itself (in root's home,
    without files of one's own), the user stays root, without the capabilities.
    """
    own_user = False
    if LINUX:
        for capability in range(64):
            prctl(PR_CAPBSET_DROP, capability)
    if os.getuid() == 0 and _open_to_all(sys.base_prefix) and _open_to_all(os.path.dirname(folder)):
        uid = FIRST_UID + _host_pid
        with contextlib.suppress(OSError):
            os.chown(folder, uid, uid)
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            own_user = True
    if LINUX:
        header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
        libc.capset(header, nothing)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        prctl(PR_SET_DUMPABLE, 0)  # no process of the same user may look into this one
    return own_user


def remove_files_left() -> None:
    """Delete what this program's own user has left in the folders that everybody may write to."""
    for folder in OPEN_FOLDERS:
        with contextlib.suppress(OSError):
            for entry in list(os.scandir(folder)):
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_uid == FIRST_UID + _host_pid:
                        is_folder = entry.is_dir(follow_symlinks=False)
                        shutil.rmtree(entry.path, ignore_errors=True) if is_folder else os.unlink(entry.path)


def _open_to_all(path: str) -> bool:
    while os.stat(path).st_mode & 0o005 == 0o005:
        if path == os.path.dirname(path):
            return True
        path = os.path.dirname(path)
    return False


_host_pid = os.getpid()  # read before there is a process namespace


def limit_resources(memory_mb: int, seconds: float, file_mb: int, open_files: int) -> None:
    """Hard limits of this process and of each of its children."""
    limits = {
        "RLIMIT_AS": memory_mb * 2**20,
        "RLIMIT_CPU": int(seconds) + 1,
        "RLIMIT_FSIZE": file_mb * 2**20,
        "RLIMIT_NOFILE": open_files,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    for name, limit in limits.items():
        set_limit(name, limit)


def set_limit(name: str, limit: int) -> None:
    """Set a resource limit by its name in `resource`, soft and hard, where the system has it."""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # macOS has not all of them
        resource.setrlimit(getattr(resource, name), (limit, limit))


# ---------------------------------------------------------------------------------------------------------------------
# System calls


def _refuse(error: int) -> tuple[int, int, int, int]:
    return 0x06, 0, 0, 0x00050000 | error


ALLOW, EPERM, ENOSYS = (0x06, 0, 0, 0x7FFF0000), 1, 38
LOAD, EQUAL, AT_LEAST, ANY_BIT = 0x20, 0x15, 0x35, 0x45  # codes of the classic packet filter


def filter_calls(alone: bool, may_fork: bool) -> bool:
    """Refuse the calls of `REFUSED` and new namespaces; not `alone` (no process namespace): acts on others too."""
    if not LINUX or platform.machine() not in MACHINES:
        return False
    column, audit, _ = MACHINES[platform.machine()]
    rules = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, audit), _refuse(EPERM), (LOAD, 0, 0, 0)]
    if column == 0:
        rules += [(AT_LEAST, 0, 1, 0x40000000), _refuse(EPERM)]  # the x32 numbers of the same calls
    refused = REFUSED | ({} if alone else ON_OTHERS) | ({} if may_fork else FORKS)
    for numbers in refused.values():
        rules += [(EQUAL, 0, 1, numbers[column]), _refuse(EPERM)]
    rules += [(EQUAL, 0, 1, CLONE3[column]), _refuse(ENOSYS)]  # its flags are in memory: callers fall back to clone
    rules += [(EQUAL, 0, 4, CLONE[column]), (LOAD, 0, 0, 16), (ANY_BIT, 0, 1, ALL_CLONE_NEW), _refuse(EPERM), ALLOW]
    for numbers in [] if alone else ON_SELF_ONLY.values():
        rules += [(EQUAL, 0, 5, numbers[column]), (LOAD, 0, 0, 16), (EQUAL, 1, 0, 0), (EQUAL, 0, 1, os.getpid())]
        rules += [ALLOW, _refuse(EPERM)]
    rules.append(ALLOW)
    code = b"".join(struct.pack("HBBI", *rule) for rule in rules)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(program, len(program))
    return prctl(PR_SET_SECCOMP, 2, ctypes.addressof(holder))


# ---------------------------------------------------------------------------------------------------------------------
# Landlock, where namespaces are not to be had

READ, READ_WRITE_FILE = 0b1101, 0b0110  # execute, read file, read folder; write and read file


def limit_paths(folder: str) -> bool:
    """Landlock: read the system's and Python's folders, write in `folder`, reach no other file. False if it cannot."""
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1) if LINUX else 0
    if version < 1:
        return False
    every = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    handled = struct.pack("QQQ", every, 0, 3 if version >= 6 else 0)  # scoped: abstract sockets, signals
    ruleset = libc.syscall(LANDLOCK_CREATE, handled, 24 if version >= 6 else 16 if version >= 4 else 8, 0)
    if ruleset < 0:
        return False
    rules = [(path, READ) for path in _visible_folders()]
    rules += [(path, READ_WRITE_FILE) for path in DEVICES] + [(folder, every)]
    for path, rights in rules:
        try:
            handle = os.open(path, os.O_PATH)
        except OSError:
            return False
        failed = libc.syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", rights, handle), 0)
        os.close(handle)
        if failed:
            return False
    return libc.syscall(LANDLOCK_RESTRICT, ruleset, 0) == 0
