"""Python programs in processes of their own, without the second that each of them needs to load the package.

A server loads the package once and forks for every program. The program has the descriptors, folder, environment and signals of the
process that a test starts, and it ends as an interpreter ends. A test puts `python()` in the place of `sys.executable`: this is a small
process that gives its descriptors to the server, passes signals on, and ends as the program ends.

A test that is about the start itself needs `sys.executable`: which modules are loaded, the installed script, an option of Python, a kill.
"""

from __future__ import annotations

import marshal
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM)
_started = {}


def python() -> tuple[str, ...]:
    """The first words of a command line, before `-m MODULE`, `-c CODE` or the path of a script."""
    import atexit
    import subprocess
    import tempfile

    pid = os.getpid()
    if pid not in _started:
        address = os.path.join(tempfile.mkdtemp(prefix="forked-"), "socket")
        command = [sys.executable, __file__, "serve", address]
        # The server ends with this process: the pipe to its standard input is then closed.
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        server.stdout.readline()
        _started[pid] = address

        @atexit.register
        def end() -> None:
            if os.getpid() == pid:  # and not in a fork of it
                server.communicate()

    return (sys.executable, "-I", "-S", __file__, "run", _started[pid])


def serve(address: str) -> None:
    """Fork for every program that is asked for; returns in the processes that are to run one."""
    import gc
    from select import select

    import langchain_cogview
    from langchain_cogview import cli

    for name in dir(langchain_cogview):
        getattr(langchain_cogview, name)
    cli.application()
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            readable, _, _ = select([listener, 0], [], [])
            if 0 in readable:
                os.unlink(address)
                os.rmdir(os.path.dirname(address))
                os._exit(0)
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    with connection:
        size, descriptors, *_ = socket.recv_fds(connection, 8, 3)
        content = b""
        while len(content) < int.from_bytes(size, "big"):
            content += connection.recv(1 << 16)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        program = os.fork()
        if program:
            for descriptor in descriptors:
                os.close(descriptor)
            connection.sendall(program.to_bytes(8, "big"))
            connection.sendall(os.waitpid(program, 0)[1].to_bytes(8, "big"))
            os._exit(0)
    become(*marshal.loads(content), descriptors)


def become(arguments: list[str], folder: str, environment: dict[bytes, bytes], descriptors: list[int]) -> None:
    """Make this process what the process is that asked for it."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    os.environb.clear()
    os.environb.update(environment)
    sys.argv = arguments
    sys.path[:1] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        new = open(
            number,
            "w" if number else "r",
            buffering=1 if number == 2 or os.isatty(number) else -1,
            encoding=old.encoding,
            errors=old.errors,
            closefd=False,
        )
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def run(address: str, *arguments: str) -> None:
    """Have the server run a program with the descriptors of this process, and end as the program ends."""
    program, early = 0, []

    def forward(number: int, frame: object) -> None:
        if program:
            os.kill(program, number)
        else:
            early.append(number)

    for number in FORWARDED:
        signal.signal(number, forward)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        content = marshal.dumps((list(arguments), os.getcwd(), dict(os.environb)))
        socket.send_fds(connection, [len(content).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(content)
        program = int.from_bytes(connection.recv(8), "big")
        for number in early:
            os.kill(program, number)
        status = int.from_bytes(connection.recv(8), "big")
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) in FORWARDED:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    {"serve": serve, "run": run}[sys.argv[1]](*sys.argv[2:])
    import runpy  # only a process that the server has forked arrives here

    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif sys.argv[0] == "-c":
        code = compile(sys.argv.pop(1), "<string>", "exec")
        exec(code, {"__name__": "__main__", "__builtins__": __builtins__})
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
