"""Runs a command as long as the process that wants it lives, and ends all that the command started when it does not.

    python keeper.py GRACE_SECONDS COMMAND...

Standard input is a pipe from that process: however it ends, the system closes the pipe. Then, or when the command has
ended, the whole process group gets SIGTERM, and SIGKILL after the grace. Run as a script of its own, in a new session;
imports nothing but the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main() -> None:
    grace, command = float(sys.argv[1]), sys.argv[2:]
    # handlers, not SIG_IGN, which the command would inherit: what ends the group must not end its keeper first
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")
    unwanted = threading.Event()
    threading.Thread(target=_wait_for_the_end_of_the_owner, args=(unwanted, process, grace), daemon=True).start()
    code = process.wait()
    if not unwanted.is_set():
        how = f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.strsignal(-code)})"
        print(f"ended by itself: {how}", flush=True)
    os.killpg(0, signal.SIGKILL)  # whatever it left behind, and this process


def _wait_for_the_end_of_the_owner(unwanted: threading.Event, process: subprocess.Popen[bytes], grace: float) -> None:
    while os.read(0, 1):
        pass
    unwanted.set()
    os.killpg(0, signal.SIGTERM)
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
